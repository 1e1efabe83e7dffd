"""What a process does in one call of the preconditioner: blocks of whole rows, pieces of cut rows, buffer offsets.

Built once from placements, on the host, then executed in every step by `exchange.ShardedPreconditioner`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..factors import Factor
from ..kernels.cpp import RowLayout
from .placement import Placement, expert_blocks, split_slice

# A product over this many elements is long enough to hide what a call costs, and its operands still fit in a cache.
MERGED_NUMEL = 1 << 18


class RowBlock(NamedTuple):
    """`rows` whole rows of each of `experts` consecutive experts, in the flat tensor of `source`.

    The experts may be those of several factors that lie one behind the other.
    """

    source: Hashable
    offset: int
    experts: int
    rows: int
    rank: int
    transposed: bool

    @property
    def end(self) -> int:
        return self.offset + self.experts * self.rows * self.rank

    def view(self, flat: Tensor) -> Tensor:
        r, rows = self.rank, self.rows
        strides = (1, 1, rows) if self.transposed else (rows * r, r, 1)
        return flat.as_strided((self.experts, rows, r), strides, flat.storage_offset() + self.offset)

    def continued_by(self, other: RowBlock) -> bool:
        """True if `other` lies directly behind, looks the same, and both together are not too many for the caches."""
        same = (self.source, self.rows, self.rank, self.transposed) == (*other[:1], *other[3:])
        return same and not self.transposed and self.end == other.offset and other.end - self.offset <= MERGED_NUMEL


class Index(list[int]):
    """Indices known on the host, and on the device from the first use on."""

    tensor: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        if self.tensor is None or self.tensor.device != device:
            self.tensor = torch.tensor(self, dtype=torch.long, device=device)
        return self.tensor


class RowBlocks:
    """All blocks of equal rank, as few as possible, and the r x r matrix of every expert in them.

    Args:
        rank: r of all of them.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.blocks: list[RowBlock] = []
        self.matrix = Index()  # (to add to, or to multiply by) among those of equal rank

    def add(self, block: RowBlock, matrix: int) -> None:
        """Puts a block behind the others; `matrix` is that of its first expert."""
        self.matrix.extend(range(matrix, matrix + block.experts))
        if self.blocks and self.blocks[-1].continued_by(block):
            last = self.blocks.pop()
            block = last._replace(experts=last.experts + block.experts)
        self.blocks.append(block)

    @property
    def counts(self) -> list[int]:
        return [block.experts for block in self.blocks]

    @cached_property
    def layout(self) -> RowLayout:
        """For the C++ kernels."""
        return RowLayout([(b.experts, b.rows, b.transposed) for b in self.blocks], self.matrix)


@dataclass
class CutRows:
    """All cut rows of equal rank in the exchange buffer: where they lie, and which matrix each belongs to."""

    rank: int
    offset: int = 0
    matrix: Index = field(default_factory=Index)

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.offset + len(self.matrix) * self.rank].view(-1, self.rank)


@dataclass
class Copies:
    """Elements to copy between a unit's local flat tensor and the exchange buffer."""

    local: Index = field(default_factory=Index)
    buffer: Index = field(default_factory=Index)


class StepPlan:
    """One call's work in one process group. Matrices are numbered within each rank, due ones before carried ones.

    Args:
        factors: all factors. places: of each of them.
        due: indices of those whose Gram matrices this call computes.
        active: indices of those whose gradients this call preconditions.
    """

    def __init__(
        self, factors: Sequence[Factor], places: Sequence[Placement], due: list[int], active: list[int]
    ) -> None:
        self.factors, self.places, self.due, self.active = factors, places, due, active
        self.units = list(dict.fromkeys(places[i].unit for i in (*due, *active)))
        # Their matrices were made by an earlier call of the same step, in which the other half was updated.
        carried = [i for i in dict.fromkeys(factors[a].partner for a in active) if i not in set(due)]
        self.due_by_rank, self.carried_by_rank = self._by_rank(due), self._by_rank(carried)
        self.matrix_of: dict[int, int] = {}
        self.num_due: dict[int, int] = {}  # Gram matrices to compute, by rank
        self.gram_offset: dict[int, int] = {}  # of those in the exchange buffer
        self.numel = 0  # of the exchange buffer
        for rank in dict.fromkeys(factors[i].rank for i in due + carried):
            count = self._number(self.due_by_rank.get(rank, []), 0)
            self._number(self.carried_by_rank.get(rank, []), count)
            self.num_due[rank], self.gram_offset[rank] = count, self.numel
            self.numel += count * rank * rank

        self.assembled = [i for i in sorted({*due, *active}) if factors[i].rank_first and places[i].is_cut]
        self.gram_blocks, self.late_gram_blocks = self._blocks(due, True, False), self._blocks(due, True, True)
        self.apply_blocks = self._blocks(active, False, False) + self._blocks(active, False, True)
        self.weight_rows, self.weight_copies = self._cut_rows(due, own=True)
        self.grad_rows, self.grad_copies = self._cut_rows(active, own=False)

    def _by_rank(self, indices: list[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for i in indices:
            found.setdefault(self.factors[i].rank, []).append(i)
        return found

    def _number(self, indices: list[int], first: int) -> int:
        """Numbers the matrices of these factors from `first` on; returns the next number."""
        for i in indices:
            self.matrix_of[i] = first
            first += self.factors[i].num_experts
        return first

    def _matrix(self, i: int, own: bool) -> int:
        """Number of the first Gram matrix of factor i (own), or of the first matrix that its gradient's rows meet."""
        return self.matrix_of[i if own else self.factors[i].partner]

    def _rows_per_expert(self, i: int) -> int:
        return self.places[i].numel // (self.factors[i].num_experts * self.factors[i].rank)

    def _blocks(self, indices: list[int], own: bool, assembled: bool) -> list[RowBlocks]:
        """Blocks of the whole rows that this process owns, or those of assembled factors, which every one owns."""
        found: dict[int, RowBlocks] = {}
        for i in indices:
            f, p, n = self.factors[i], self.places[i], self._rows_per_expert(i)
            if (i in self.assembled) != assembled:
                continue
            matrix = self._matrix(i, own)
            blocks = found.setdefault(f.rank, RowBlocks(f.rank))
            if assembled:
                blocks.add(RowBlock(("assembled", i), 0, 1, n, f.rank, True), matrix)
            elif f.rank_first:
                if p.start < p.stop:
                    blocks.add(RowBlock(p.unit, p.local_offset, 1, n, f.rank, True), matrix)
            else:
                _, first_row, num_rows = split_slice(p.start, p.stop, f.rank)
                base = p.local_offset + first_row * f.rank - p.start
                for expert, count, row, rows in expert_blocks(first_row, num_rows, n):
                    blocks.add(RowBlock(p.unit, base + row * f.rank, count, rows, f.rank, False), matrix + expert)
        return [blocks for blocks in found.values() if blocks.blocks]

    def _cut_rows(self, indices: list[int], own: bool) -> tuple[list[CutRows], dict[Hashable, Copies]]:
        """Slots in the exchange buffer for every cut row of the group, and this process's pieces of them."""
        indices = [i for i in indices if not self.factors[i].rank_first]
        by_rank: dict[int, CutRows] = {}
        slots: dict[tuple[int, int], int] = {}
        for i in indices:
            rank, n = self.factors[i].rank, self._rows_per_expert(i)
            rows = by_rank.setdefault(rank, CutRows(rank))
            for row in self.places[i].cut_rows(rank):
                slots[i, row] = len(rows.matrix)
                rows.matrix.append(self._matrix(i, own) + row // n)
        for rows in by_rank.values():
            rows.offset = self.numel
            self.numel += len(rows.matrix) * rows.rank

        copies: dict[Hashable, Copies] = {}
        for i in indices:
            rank, p = self.factors[i].rank, self.places[i]
            for piece in split_slice(p.start, p.stop, rank)[0]:
                at = by_rank[rank].offset + slots[i, piece.row] * rank + piece.column
                local = p.local_offset + piece.offset
                unit = copies.setdefault(p.unit, Copies())
                unit.local.extend(range(local, local + piece.length))
                unit.buffer.extend(range(at, at + piece.length))
        return [rows for rows in by_rank.values() if rows.matrix], copies
