"""What each rank does in one call of the preconditioner: blocks of whole rows, pieces of cut rows, buffer offsets.

Built once from placements, on the host, then executed in every step by `sharded.ShardedPreconditioner`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cpp import Rows
from .placement import Placement, expert_blocks, split_slice

Extents = dict[Hashable, list[tuple[int, int]]]  # unit -> (start, end) of elements in its flat tensor

# A product over this many elements is long enough to hide what a call costs, and its operands still fit in a cache.
MERGED_NUMEL = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One lora_A or lora_B and its place. `partner` is the index of the other factor of the pair."""

    name: str
    num_experts: int
    rank: int
    rank_first: bool
    partner: int
    placement: Placement

    @property
    def rows_per_expert(self) -> int:
        return self.placement.numel // (self.num_experts * self.rank)


class Block(NamedTuple):
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

    def continued_by(self, other: Block) -> bool:
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


class Blocks:
    """All blocks of equal rank, as few as possible, and the Gram matrix of every expert in them.

    Args:
        rank: r of all of them.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.blocks: list[Block] = []
        self.matrix = Index()  # (to add to, or whose inverse to apply) among those of equal rank

    def add(self, block: Block, matrix: int) -> None:
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
    def rows(self) -> Rows:
        """For the compiled kernels."""
        return Rows([(b.experts, b.rows, b.transposed) for b in self.blocks], self.matrix)


@dataclass
class CutRows:
    """All cut rows of equal rank in the exchange buffer: where they lie, and which Gram matrix each belongs to."""

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


class Plan:
    """Who owns what in one call: built once from placements, then only executed.

    Args:
        factors: all factors of one process group.
        due: indices of those whose Gram matrices this call computes.
        active: indices of those whose gradients this call preconditions.
    """

    def __init__(self, factors: list[Factor], due: list[int], active: list[int]) -> None:
        self.factors, self.due, self.active = factors, due, active
        # Gram matrices whose inverse an earlier call of the same step computed: the other half was updated then.
        self.carried = [i for i in dict.fromkeys(factors[a].partner for a in active) if i not in set(due)]
        self.matrix_of: dict[int, int] = {}
        self.num_matrices: dict[int, int] = {}
        for i in due + self.carried:
            rank = factors[i].rank
            self.matrix_of[i] = self.num_matrices.get(rank, 0)
            self.num_matrices[rank] = self.matrix_of[i] + factors[i].num_experts
        self.gram_offset: dict[int, int] = {}
        self.numel = 0
        for rank in self.num_matrices:
            self.gram_offset[rank] = self.numel
            self.numel += self.num_due_matrices(rank) * rank * rank

        self.assembled = [i for i in sorted({*due, *active}) if factors[i].rank_first and factors[i].placement.is_cut]
        self.gram_blocks, self.late_gram_blocks = self._blocks(due, True, False), self._blocks(due, True, True)
        self.apply_blocks = self._blocks(active, False, False) + self._blocks(active, False, True)
        self.weight_rows, self.weight_copies = self._cut_rows(due, own=True)
        self.grad_rows, self.grad_copies = self._cut_rows(active, own=False)

    def num_due_matrices(self, rank: int) -> int:
        return sum(self.factors[i].num_experts for i in self.due if self.factors[i].rank == rank)

    def matrix(self, i: int, own: bool) -> int:
        """Index of the first Gram matrix of factor i (own), or of the one whose inverse preconditions it."""
        return self.matrix_of[i if own else self.factors[i].partner]

    def _blocks(self, indices: list[int], own: bool, assembled: bool) -> list[Blocks]:
        """Blocks of the whole rows that this rank owns, or those of assembled factors, which every rank owns."""
        found: dict[int, Blocks] = {}
        for i in indices:
            f = self.factors[i]
            p, matrix = f.placement, self.matrix(i, own)
            if (i in self.assembled) != assembled:
                continue
            blocks = found.setdefault(f.rank, Blocks(f.rank))
            if assembled:
                blocks.add(Block(("assembled", i), 0, 1, f.rows_per_expert, f.rank, True), matrix)
            elif f.rank_first:
                if p.start < p.stop:
                    blocks.add(Block(p.unit, p.local_offset, 1, f.rows_per_expert, f.rank, True), matrix)
            else:
                _, first_row, num_rows = split_slice(p.start, p.stop, f.rank)
                base = p.local_offset + first_row * f.rank - p.start
                for expert, count, row, rows in expert_blocks(first_row, num_rows, f.rows_per_expert):
                    blocks.add(Block(p.unit, base + row * f.rank, count, rows, f.rank, False), matrix + expert)
        return [blocks for blocks in found.values() if blocks.blocks]

    def _cut_rows(self, indices: list[int], own: bool) -> tuple[list[CutRows], dict[Hashable, Copies]]:
        """Slots in the exchange buffer for every cut row of the group, and this rank's pieces of them."""
        by_rank: dict[int, CutRows] = {}
        slots: dict[tuple[int, int], int] = {}
        for i in indices:
            f = self.factors[i]
            if f.rank_first:
                continue
            rows = by_rank.setdefault(f.rank, CutRows(f.rank))
            for row in f.placement.cut_rows(f.rank):
                slots[i, row] = len(rows.matrix)
                rows.matrix.append(self.matrix(i, own) + row // f.rows_per_expert)
        for rows in by_rank.values():
            rows.offset = self.numel
            self.numel += len(rows.matrix) * rows.rank

        copies: dict[Hashable, Copies] = {}
        for i in indices:
            f = self.factors[i]
            if f.rank_first:
                continue
            for piece in split_slice(f.placement.start, f.placement.stop, f.rank)[0]:
                at = by_rank[f.rank].offset + slots[i, piece.row] * f.rank + piece.column
                local = f.placement.local_offset + piece.offset
                unit = copies.setdefault(f.placement.unit, Copies())
                unit.local.extend(range(local, local + piece.length))
                unit.buffer.extend(range(at, at + piece.length))
        return [rows for rows in by_rank.values() if rows.matrix], copies
