"""What a process does in one call of the preconditioner: blocks of whole rows, pieces of cut rows, buffer offsets.

Built once from placements, on the host, then executed in every step by `exchange.ShardedPreconditioner`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
    interleaved: bool = False  # (rows, rank, experts)

    @property
    def end(self) -> int:
        return self.offset + self.experts * self.rows * self.rank

    def view(self, flat: Tensor) -> Tensor:
        r, rows = self.rank, self.rows
        strides = (rows * r, 1, rows) if self.transposed else (rows * r, r, 1)
        if self.interleaved:
            strides = (1, self.experts * r, self.experts)
        return flat.as_strided((self.experts, rows, r), strides, flat.storage_offset() + self.offset)

    def continued_by(self, other: RowBlock) -> bool:
        """True if `other` lies directly behind, looks the same, and both together are not too many for the caches."""
        same = (self.source, *self[3:]) == (other.source, *other[3:])
        mergeable = same and not self.transposed and not self.interleaved
        return mergeable and self.end == other.offset and other.end - self.offset <= MERGED_NUMEL


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
        rank: r of all of them. interleaved: of all of them; the C++ kernels know no such blocks.
    """

    def __init__(self, rank: int, interleaved: bool = False) -> None:
        self.rank, self.interleaved = rank, interleaved
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


class Rows:
    """The rows of some factors, of their weights or their gradients, and their Gram matrices in the exchange buffer.

    Args:
        order: indices of the factors by rank; their Gram matrices are numbered in this order.
    """

    def __init__(self, order: Mapping[int, Sequence[int]]) -> None:
        self.order = order
        self.first: dict[int, int] = {}  # factor index -> number of its first Gram matrix among those of its rank
        self.num: dict[int, int] = {}  # Gram matrices of each rank
        self.gram_offset: dict[int, int] = {}  # where they begin in the buffer, if it has them
        self.own: list[RowBlocks] = []  # whole rows that this process owns
        self.assembled: list[RowBlocks] = []  # those of assembled factors, which every process owns
        self.cut: list[CutRows] = []
        self.copies: dict[Hashable, Copies] = {}  # this process's pieces of the cut rows

    def grams(self, buffer: Tensor) -> dict[int, Tensor]:
        """Views of the buffer, (N, r, r) by rank; none if it has no Gram matrices of these rows."""
        return {
            r: buffer[offset : offset + self.num[r] * r * r].view(-1, r, r) for r, offset in self.gram_offset.items()
        }


class StepPlan:
    """One call's work in one process group.

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
        self.assembled = [  # (factor, expert) of those stored rank first that a boundary cuts
            (i, expert)
            for i in sorted(self.due | self.active)
            if factors[i].rank_first
            for expert in places[i].cut_rows(self._row_numel(i))
        ]
        active = sorted(active, key=lambda i: factors[i].partner not in self.due)  # stable
        partners = dict.fromkeys(factors[i].partner for i in active)
        self.carried = [i for i in partners if i not in self.due]  # taken by an earlier call of the same step
        needed = [*(i for i in partners if i in self.due), *(i for i in due if i not in partners)]
        self.numel = 0  # of the exchange buffer
        self.weights, self.grads = Rows(self._by_rank(needed)), Rows(self._by_rank(active))
        for rows, with_grams in ((self.weights, True), (self.grads, gradient_grams)):
            self._number(rows, with_grams)
            rows.own, rows.assembled = self._blocks(rows, False), self._blocks(rows, True)
        for rows in (self.weights, self.grads):
            self._cut_rows(rows)
        self._triangles: tuple[Tensor, Tensor] | None = None

    def triangles(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Gram matrices are symmetric: positions in the buffer without what lies below their diagonals; and the place
        among these of every element of the buffer.
        """
        if self._triangles is None:
            every = torch.arange(self.numel)
            twin = every.clone()
            for rows in (self.weights, self.grads):
                for own in rows.grams(twin).values():
                    own.copy_(own.triu() + own.triu(1).mT)
            kept = twin == every
            self._triangles = every[kept].to(device), (kept.cumsum(0) - 1)[twin].to(device)
        return self._triangles

    def _by_rank(self, indices: Sequence[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for i in indices:
            found.setdefault(self.factors[i].rank, []).append(i)
        return found

    def _number(self, rows: Rows, with_grams: bool) -> None:
        for rank, indices in rows.order.items():
            count = 0
            for i in indices:
                rows.first[i] = count
                count += self.factors[i].num_experts
            rows.num[rank] = count
            if with_grams:
                rows.gram_offset[rank] = self.numel
                self.numel += count * rank * rank

    def _rows_per_expert(self, i: int) -> int:
        return self.places[i].numel // (self.factors[i].num_experts * self.factors[i].rank)

    def _row_numel(self, i: int) -> int:
        """Consecutive elements of factor i that must be whole to be used: a row, all experts' row, or an expert."""
        f = self.factors[i]
        return f.rank * (self._rows_per_expert(i) if f.rank_first else f.num_experts if f.experts_last else 1)

    def own_part(self, i: int, expert: int) -> tuple[slice, slice]:
        """What this process has of one expert of a factor stored rank first: where in the expert, and in the unit."""
        p, size = self.places[i], self._row_numel(i)
        start, stop = max(p.start, expert * size), min(p.stop, (expert + 1) * size)
        stop = max(start, stop)
        local, first = p.local_offset - p.start, expert * size
        return slice(start - first, stop - first), slice(local + start, local + stop)

    def _blocks(self, rows: Rows, assembled: bool) -> list[RowBlocks]:
        found: dict[tuple[int, bool], RowBlocks] = {}
        for i in sorted(rows.first):  # as they lie in memory
            f, p, n, matrix = self.factors[i], self.places[i], self._rows_per_expert(i), rows.first[i]
            blocks = found.setdefault((f.rank, f.experts_last), RowBlocks(f.rank, f.experts_last))
            if assembled:
                for expert in (e for j, e in self.assembled if j == i):
                    blocks.add(RowBlock(("assembled", i, expert), 0, 1, n, f.rank, True), matrix + expert)
                continue
            size = self._row_numel(i)
            _, first_row, num_rows = split_slice(p.start, p.stop, size)
            base = p.local_offset + first_row * size - p.start
            if not num_rows:
                continue
            if f.rank_first:
                blocks.add(RowBlock(p.unit, base, num_rows, n, f.rank, True), matrix + first_row)
            elif f.experts_last:
                blocks.add(RowBlock(p.unit, base, f.num_experts, num_rows, f.rank, False, True), matrix)
            else:
                for expert, count, row, per_expert in expert_blocks(first_row, num_rows, n):
                    block = RowBlock(p.unit, base + row * f.rank, count, per_expert, f.rank, False)
                    blocks.add(block, matrix + expert)
        return [blocks for blocks in found.values() if blocks.blocks]

    def _cut_rows(self, rows: Rows) -> None:
        """Slots in the exchange buffer for every cut row of the group, and this process's pieces of them."""
        for rank, indices in rows.order.items():
            cut, slots = CutRows(rank, self.numel), {}
            indices = [i for i in indices if not self.factors[i].rank_first]
            for i in indices:
                experts, first = self._row_numel(i) // rank, rows.first[i]
                for row in self.places[i].cut_rows(self._row_numel(i)):
                    slots[i, row] = self.numel + len(cut.matrix) * rank
                    expert = 0 if self.factors[i].experts_last else row // self._rows_per_expert(i)
                    cut.matrix.extend(range(first + expert, first + expert + experts))
            for i in indices:
                p, experts = self.places[i], self._row_numel(i) // rank
                for piece in split_slice(p.start, p.stop, experts * rank)[0]:
                    local, columns = p.local_offset + piece.offset, range(piece.column, piece.column + piece.length)
                    unit = rows.copies.setdefault(p.unit, Copies())
                    unit.local.extend(range(local, local + piece.length))
                    unit.buffer.extend(slots[i, piece.row] + c % experts * rank + c // experts for c in columns)
            if cut.matrix:
                rows.cut.append(cut)
                self.numel += len(cut.matrix) * rank
