"""What a process does in one call of the preconditioner: blocks of whole rows, pieces of cut rows, buffer offsets.

Built once from placements, on the host, then executed in every step by `exchange.ShardedPreconditioner`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..factors import Factor
from ..kernels.rows import Index, Moves, RowBlock, RowBlocks
from .placement import Placement, expert_blocks, split_slice
from .transfer import Processes, Transfer


@dataclass
class Copies:
    """Elements to copy between a unit's local flat tensor and a table of cut rows."""

    local: Index = field(default_factory=Index)
    table: Index = field(default_factory=Index)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first local, first in the table, length) of what is consecutive in both."""
        start = 0
        for k in range(1, len(self.local) + 1):
            last = k - 1
            if k < len(self.local) and (self.local[k], self.table[k]) == (self.local[last] + 1, self.table[last] + 1):
                continue
            yield self.local[start], self.table[start], k - start
            start = k


class Rows:
    """The rows of some factors, of their weights or their gradients, and the r x r matrices that belong to them.

    Args:
        order: indices of the factors by rank; their matrices are numbered in this order.
    """

    def __init__(self, order: Mapping[int, Sequence[int]]) -> None:
        self.order = order
        self.number: dict[int, list[int]] = {}  # factor index -> number of each expert's matrix, -1: not here
        self.wanted: dict[int, range] = {}  # factor index -> numbers of the matrices that this process wants
        self.num: dict[int, int] = {}  # matrices of each rank that are wanted
        self.sums: dict[int, int] = {}  # and all that are summed here; empty: gradients whose sums nobody wants
        self.own: list[RowBlocks] = []  # whole rows that this process owns
        self.assembled: list[RowBlocks] = []  # those of assembled experts
        # Cut rows that concern this process, in a table for each rank; interleaved ones take a row for each expert.
        self.cut: dict[int, int] = {}  # rows of the table
        self.cut_blocks: dict[tuple[int, bool], RowBlocks] = {}  # those that are wanted here
        self.copies: dict[tuple[Hashable, int], Copies] = {}  # (unit, rank) -> this process's pieces of the cut rows


WEIGHT, GRAD = range(2)  # in a unit's `Flat`, and in the names of tables


class StepPlan:
    """One call's work in one process group.

    A process wants the Gram matrices of the experts of which it has gradients of the partner's. Those it sums, for
    itself or others, are of experts of which it has whole rows.

    Args:
        factors: all factors. places: of each of them.
        due: indices of those whose Gram matrices this call computes.
        active: indices of those whose gradients this call multiplies. The Gram matrices of their partners come first
            among the due ones, in the same order; those that an earlier call has computed come behind.
        gradient_grams: compute the Gram matrices of the active gradients, too.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        places: Sequence[Placement],
        due: list[int],
        active: list[int],
        gradient_grams: bool = False,
    ) -> None:
        self.factors, self.places, self.due, self.active = factors, places, set(due), set(active)
        self.units = list(dict.fromkeys(places[i].unit for i in (*due, *active)))
        self.gradient_grams = gradient_grams
        self.kept: Tensor | None = None  # what a step writes and the next one may overwrite
        active = sorted(active, key=lambda i: factors[i].partner not in self.due)  # stable
        partners = dict.fromkeys(factors[i].partner for i in active)
        self.carried = [i for i in partners if i not in self.due]  # taken by an earlier call of the same step
        needed = [*(i for i in partners if i in self.due), *(i for i in due if i not in partners)]
        first = places[self.active_or_due[0]]
        self.process, self.world = first.process, first.world
        # Phase 0 by (weights or gradients, elements of an expert), phase 2 by (which, rank, "grams" or "rows").
        self.assembly, self.exchange = (Transfer(first.process, first.world) for _ in range(2))
        self.assembled: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (factor, expert) of each row of a table
        self.weights, self.grads = Rows(self._by_rank(needed)), Rows(self._by_rank(active))
        for which, rows in enumerate((self.weights, self.grads)):
            self._number(which, rows)
            for i in sorted(rows.number):
                self._assemble(which, i)
            rows.own, rows.assembled = self._blocks(which, rows, False), self._blocks(which, rows, True)
            for rank, indices in rows.order.items():
                rows.cut[rank] = 0
                for i in indices:
                    self._exchange(which, rows, i)

    @property
    def active_or_due(self) -> list[int]:
        return [*self.active, *self.due]

    def _by_rank(self, indices: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for i in indices:
            found.setdefault(self.factors[i].rank, []).append(i)
        return found

    # -- who has what -------------------------------------------------------------------------------------------------

    def _rows_per_expert(self, i: int) -> int:
        return self.places[i].numel // (self.factors[i].num_experts * self.factors[i].rank)

    def _row_numel(self, i: int) -> int:
        """Consecutive elements of factor i that must be whole to be used: a row, all experts' row, or an expert."""
        f = self.factors[i]
        return f.rank * (self._rows_per_expert(i) if f.rank_first else f.num_experts if f.experts_last else 1)

    def _expert_numel(self, i: int) -> int:
        return self.places[i].numel // self.factors[i].num_experts

    def _experts(self, i: int) -> range:
        """The experts of factor i of which this process has elements."""
        touched = self.places[i].touched(self._expert_numel(i))
        return range(self.factors[i].num_experts) if touched and self.factors[i].experts_last else touched

    def _processes(self, i: int, experts: Tensor) -> Processes:
        """The processes that have elements of each of these experts of factor i."""
        if self.factors[i].experts_last:
            return self.places[i].processes(self.places[i].numel, torch.zeros_like(experts))
        return self.places[i].processes(self._expert_numel(i), experts)

    def _wanting(self, which: int, i: int) -> int:
        """The factor whose owners want the Gram matrices of factor i's weights or gradients."""
        return self.factors[i].partner if which == WEIGHT else i

    def own_part(self, i: int, expert: int) -> tuple[slice, slice]:
        """What this process has of one expert of a factor stored rank first: where in the expert, and in the unit."""
        p, size = self.places[i], self._row_numel(i)
        start, stop = max(p.start, expert * size), min(p.stop, (expert + 1) * size)
        stop = max(start, stop)
        local, first = p.local_offset - p.start, expert * size
        return slice(start - first, stop - first), slice(local + start, local + stop)

    # -- what it does -------------------------------------------------------------------------------------------------

    def _number(self, which: int, rows: Rows) -> None:
        """Wanted matrices first, in the order of factors; then those that are summed here for others."""
        for rank, indices in rows.order.items():
            count = 0
            for i in indices:
                experts = self._experts(self._wanting(which, i))
                rows.wanted[i] = range(count, count + len(experts))
                numbers = rows.number[i] = [-1] * self.factors[i].num_experts
                numbers[experts.start : experts.stop] = rows.wanted[i]
                count += len(experts)
            rows.num[rank] = count
            for i in indices:
                for expert in self._experts(i):
                    if rows.number[i][expert] < 0:
                        rows.number[i][expert] = count
                        count += 1
            if which == WEIGHT or self.gradient_grams:
                rows.sums[rank] = count

    def _assemble(self, which: int, i: int) -> None:
        """Slots of phase 0 for the experts of factor i that are stored rank first and cut."""
        size = self._row_numel(i)
        cut = self.places[i].cut_rows(size) if self.factors[i].rank_first else []
        if not cut:
            return
        experts = torch.tensor(cut)
        held, wanted = self._processes(i, experts), self._processes(self._wanting(which, i), experts)
        table = self.assembled.setdefault((which, size), [])
        first, wanting = len(table), self._experts(self._wanting(which, i))
        mine = [e in self._experts(i) or e in wanting for e in cut]
        table += [(i, e) for e, concerned in zip(cut, mine, strict=True) if concerned]
        self.assembly.add((which, size), size, held, wanted, first - 1 + torch.tensor(mine).cumsum(0))

    def _blocks(self, which: int, rows: Rows, assembled: bool) -> list[RowBlocks]:
        found: dict[tuple[int, bool], RowBlocks] = {}
        for i in sorted(rows.number):  # as they lie in memory
            f, p, n, number = self.factors[i], self.places[i], self._rows_per_expert(i), rows.number[i]
            blocks = found.setdefault((f.rank, f.experts_last), RowBlocks(f.rank, f.experts_last))
            size = self._row_numel(i)
            if assembled:
                wanting = self._experts(self._wanting(which, i))
                for expert in (e for j, e in self.assembled.get((which, size), []) if j == i and e in wanting):
                    block = RowBlock(("assembled", i, expert), 0, 1, n, f.rank, True)
                    blocks.add(block, [number[expert]])
                continue
            _, first_row, num_rows = split_slice(p.start, p.stop, size)
            base = p.local_offset + first_row * size - p.start
            if not num_rows:
                continue
            if f.rank_first:
                block = RowBlock(p.unit, base, num_rows, n, f.rank, True)
                blocks.add(block, number[first_row : first_row + num_rows])
            elif f.experts_last:
                blocks.add(RowBlock(p.unit, base, f.num_experts, num_rows, f.rank, False, True), number)
            else:
                for expert, count, row, per_expert in expert_blocks(first_row, num_rows, n):
                    block = RowBlock(p.unit, base + row * f.rank, count, per_expert, f.rank, False)
                    blocks.add(block, number[expert : expert + count])
        return [blocks for blocks in found.values() if blocks.blocks]

    def _exchange(self, which: int, rows: Rows, i: int) -> None:
        """Slots of phase 2 for the Gram matrices and the cut rows of factor i, and this process's pieces of these."""
        f, r, wanting = self.factors[i], self.factors[i].rank, self._wanting(which, i)
        if r in rows.sums and self.world > 1:
            experts = torch.arange(f.num_experts)
            held, wanted = self._processes(i, experts), self._processes(wanting, experts)
            whole = held[0] == held[1] if f.rank_first else torch.ones_like(experts, dtype=torch.bool)
            numbers = torch.tensor(rows.number[i])
            held, wanted = ((a[whole], b[whole]) for a, b in (held, wanted))
            self.exchange.add((which, r, "grams"), r * r, held, wanted, numbers[whole], symmetric=True)
        size = self._row_numel(i)
        cut = [] if f.rank_first else self.places[i].cut_rows(size)
        if not cut:
            return
        # A row is one expert's, or (out, r, E) all experts': then each has a slot of its own.
        per_row, slots = size // r, torch.tensor(cut)
        experts = torch.zeros_like(slots) if f.experts_last else slots // self._rows_per_expert(i)
        held, numbers = self.places[i].processes(size, slots), torch.tensor(rows.number[i])
        wanted_of = [self._processes(wanting, experts + k) if r in rows.sums else held for k in range(per_row)]
        wants = [self._among(processes) for processes in wanted_of]
        mine = torch.stack([self._among(held), *wants]).any(0)
        starts = rows.cut[r] + (mine.cumsum(0) - 1) * per_row
        rows.cut[r] += int(mine.sum()) * per_row
        for k in range(per_row):
            self.exchange.add((which, r, "rows"), r, held, wanted_of[k], starts + k)
        # All cut rows of an expert are wanted where one is, and lie in the table at equal distances.
        source, kind = ("cut", which, r), (r, f.experts_last)
        lines: dict[int, list[int]] = {}  # expert -> its rows in the table
        for k in range(per_row):
            for start, expert in zip((starts + k)[wants[k]].tolist(), (experts + k)[wants[k]].tolist(), strict=True):
                lines.setdefault(expert, []).append(start)
        # Interleaved experts are neighbours in every row.
        for together in [list(lines)] if f.experts_last and lines else [[expert] for expert in lines]:
            own, distance = lines[together[0]], per_row if f.experts_last else 0
            block = RowBlock(source, own[0] * r, len(together), len(own), r, False, f.experts_last, distance)
            rows.cut_blocks.setdefault(kind, RowBlocks(*kind)).add(block, numbers[together].tolist())
        p, position = self.places[i], dict(zip(cut, starts.tolist(), strict=True))
        for piece in split_slice(p.start, p.stop, size)[0]:
            local, columns = p.local_offset + piece.offset, range(piece.column, piece.column + piece.length)
            unit = rows.copies.setdefault((p.unit, r), Copies())
            unit.local.extend(range(local, local + piece.length))
            unit.table.extend(position[piece.row] * r + c % per_row * r + c // per_row for c in columns)

    @cached_property
    def gathered(self) -> Moves:
        """This process's pieces of cut rows, into the tables; `returned`: those of the gradients, back."""
        return self._pieces((WEIGHT, self.weights), (GRAD, self.grads))

    @cached_property
    def returned(self) -> Moves:
        return self._pieces((GRAD, self.grads), back=True)

    def _pieces(self, *tables: tuple[int, Rows], back: bool = False) -> Moves:
        moves = Moves()
        for which, rows in tables:
            for (unit, rank), copies in rows.copies.items():
                for local, at, length in copies.runs():
                    ends = (((which, rank, "rows"), at), ((which, unit), local))
                    (target, there), (source, here) = reversed(ends) if back else ends
                    moves.add(target, there, [(source, here, False)], length)
        return moves

    def _among(self, processes: Processes) -> Tensor:
        """Whether this process is among them, for every slot."""
        return (processes[0] <= self.process) & (self.process <= processes[1])
