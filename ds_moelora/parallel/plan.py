"""What each rank does in one call of the preconditioner: blocks of whole rows, pieces of cut rows, buffer offsets.

Built once from placements, on the host, then executed in every step by `sharded.ShardedPreconditioner`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .placement import Placement, expert_blocks, split_slice


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
    """`rows` whole rows of each of `experts` consecutive experts, in the flat tensor of `source`."""

    source: Hashable
    offset: int
    experts: int
    rows: int
    rank: int
    transposed: bool
    matrix: int  # of the first expert's Gram matrix (to add to, or whose inverse to apply) among those of equal rank

    def view(self, flat: Tensor) -> Tensor:
        piece = flat[self.offset : self.offset + self.experts * self.rows * self.rank]
        if self.transposed:
            return piece.view(self.rank, self.rows).T.unsqueeze(0)
        return piece.view(self.experts, self.rows, self.rank)


class Index(list[int]):
    """Indices known on the host, and on the device from the first use on."""

    tensor: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        if self.tensor is None or self.tensor.device != device:
            self.tensor = torch.tensor(self, dtype=torch.long, device=device)
        return self.tensor


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
        self.gram_blocks, self.late_gram_blocks = self._blocks(due, own=True)
        early, late = self._blocks(active, own=False)
        self.apply_blocks = early + late
        self.weight_rows, self.weight_copies = self._cut_rows(due, own=True)
        self.grad_rows, self.grad_copies = self._cut_rows(active, own=False)

    def num_due_matrices(self, rank: int) -> int:
        return sum(self.factors[i].num_experts for i in self.due if self.factors[i].rank == rank)

    def matrix(self, i: int, own: bool) -> int:
        """Index of the first Gram matrix of factor i (own), or of the one whose inverse preconditions it."""
        return self.matrix_of[i if own else self.factors[i].partner]

    def _blocks(self, indices: list[int], own: bool) -> tuple[list[Block], list[Block]]:
        """Blocks of the whole rows that this rank owns, and those of assembled factors, which every rank owns."""
        local, assembled = [], []
        for i in indices:
            f = self.factors[i]
            p, matrix = f.placement, self.matrix(i, own)
            if i in self.assembled:
                assembled.append(Block(("assembled", i), 0, 1, f.rows_per_expert, f.rank, True, matrix))
            elif f.rank_first:
                if p.start < p.stop:
                    local.append(Block(p.unit, p.local_offset, 1, f.rows_per_expert, f.rank, True, matrix))
            else:
                _, first_row, num_rows = split_slice(p.start, p.stop, f.rank)
                base = p.local_offset + first_row * f.rank - p.start
                for expert, count, row, rows in expert_blocks(first_row, num_rows, f.rows_per_expert):
                    local.append(Block(p.unit, base + row * f.rank, count, rows, f.rank, False, matrix + expert))
        return local, assembled

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
