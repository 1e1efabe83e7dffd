"""The Riemannian preconditioner on slices of flat partitions, exact wherever the boundaries fall.

Communication phases of one call (one optimizer step, or one parameter group's part of it), per process group:

    0. Only for factors stored rank first (PEFT's lora_A) that a boundary cuts: one all-reduce assembles weight and
       gradient of these few factors on every rank. 8 bytes per element of each.
    1. local: every rank sums the Gram matrices of the whole rows it owns.
    2. one all-reduce of a zero-filled buffer: all Gram matrices, and the rows that a boundary cuts, weight and
       gradient, each rank filling in its piece. 4 * (sum of E r^2 over the factors + 2 r per cut row) bytes,
       independent of in and out.
    3. local: outer products of the cut rows complete the Gram matrices; batched Cholesky; every rank multiplies the
       gradient rows it owns, in place, and its pieces of the cut rows.

What takes part in a collective follows from placements alone, which all ranks share, never from the values or the
presence of a gradient: ranks cannot disagree on whether a collective happens. Where nothing is partitioned (one
process, no ZeRO) there is no communication at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.preconditioner import algebra_dtype, damped_inverse, gram, precondition_
from .placement import Placement, expert_blocks, split_slice

Flat = tuple[Tensor, Tensor | None]  # a unit's local flat weights and their gradient


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
    """`count` consecutive experts' worth of `rows` whole rows each, in the flat tensor of `source`."""

    source: Hashable
    offset: int
    count: int
    rows: int
    rank: int
    transposed: bool
    index: int  # of the first expert's Gram matrix (to add to, or whose inverse to apply) among those of equal rank

    def view(self, flat: Tensor) -> Tensor:
        piece = flat[self.offset : self.offset + self.count * self.rows * self.rank]
        if self.transposed:
            return piece.view(self.rank, self.rows).T.unsqueeze(0)
        return piece.view(self.count, self.rows, self.rank)


class _Index(list[int]):
    """Indices known on the host, and on the device from the first use on."""

    tensor: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        if self.tensor is None or self.tensor.device != device:
            self.tensor = torch.tensor(self, dtype=torch.long, device=device)
        return self.tensor


@dataclass
class _CutRows:
    """All cut rows of equal rank in the exchange buffer: where they lie, and which Gram matrix each belongs to."""

    rank: int
    offset: int = 0
    matrix: _Index = field(default_factory=_Index)

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.offset + len(self.matrix) * self.rank].view(-1, self.rank)


@dataclass
class _Copies:
    """Elements to copy between a unit's local flat tensor and the exchange buffer."""

    local: _Index = field(default_factory=_Index)
    buffer: _Index = field(default_factory=_Index)


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
                    local.append(
                        Block(p.unit, base + row * f.rank, count, rows, f.rank, False, matrix + expert)
                    )
        return local, assembled

    def _cut_rows(self, indices: list[int], own: bool) -> tuple[list[_CutRows], dict[Hashable, _Copies]]:
        """Slots in the exchange buffer for every cut row of the group, and this rank's pieces of them."""
        by_rank: dict[int, _CutRows] = {}
        slots: dict[tuple[int, int], int] = {}
        for i in indices:
            f = self.factors[i]
            if f.rank_first:
                continue
            rows = by_rank.setdefault(f.rank, _CutRows(f.rank))
            for row in f.placement.cut_rows(f.rank):
                slots[i, row] = len(rows.matrix)
                rows.matrix.append(self.matrix(i, own) + row // f.rows_per_expert)
        for rows in by_rank.values():
            rows.offset = self.numel
            self.numel += len(rows.matrix) * rows.rank

        copies: dict[Hashable, _Copies] = {}
        for i in indices:
            f = self.factors[i]
            if f.rank_first:
                continue
            for piece in split_slice(f.placement.start, f.placement.stop, f.rank)[0]:
                at = by_rank[f.rank].offset + slots[i, piece.row] * f.rank + piece.column
                local = f.placement.local_offset + piece.offset
                unit = copies.setdefault(f.placement.unit, _Copies())
                unit.local.extend(range(local, local + piece.length))
                unit.buffer.extend(range(at, at + piece.length))
        return [rows for rows in by_rank.values() if rows.matrix], copies


class ShardedPreconditioner:
    """Preconditions the gradients of pairs in place, on whatever part of them each rank owns.

    Args:
        factors: of all pairs, in an order equal on every rank.
        flat: unit -> (local flat weights, their gradient or None).
        comm_device: device on which the process groups communicate; None: where the weights are.
    """

    def __init__(
        self,
        factors: list[Factor],
        flat: Callable[[Hashable], Flat],
        comm_device: torch.device | None = None,
    ) -> None:
        self.factors, self.flat, self.comm_device = factors, flat, comm_device
        self._plans: dict[tuple[int, frozenset[Hashable], frozenset[int]], Plan] = {}
        self._stepped: set[Hashable] = set()
        self._inverses: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, units: set[Hashable], damping: Callable[[int], float]) -> None:
        """Preconditions the gradients of `units`.

        A pair may lie in two units that are stepped one after the other (LoRA+ groups, small ZeRO-3 sub-groups). Both
        Gram matrices are then taken when the first of them is stepped, before any weight of the pair moves.

        Args:
            units: what this call of `optimizer.step()` updates. A unit seen again begins a new step.
            damping: factor index -> d for that factor's gradient.
        """
        if self._stepped & units:
            self._stepped, self._inverses = set(), {}
        self._stepped |= units
        active = [i for i, f in enumerate(self.factors) if f.placement.unit in units]
        pairs = sorted({*active, *(self.factors[i].partner for i in active)})
        due = [i for i in pairs if i not in self._inverses]
        groups = {id(self.factors[i].placement.group): self.factors[i].placement.group for i in pairs}
        for key, group in groups.items():
            mine = {i for i in pairs if id(self.factors[i].placement.group) == key}
            plan_key = (key, frozenset(units), frozenset(due))
            if plan_key not in self._plans:
                plan = Plan(self.factors, [i for i in due if i in mine], [i for i in active if i in mine])
                self._plans[plan_key] = plan
            self._run(self._plans[plan_key], group, damping)

    def _run(self, plan: Plan, group: dist.ProcessGroup | None, damping: Callable[[int], float]) -> None:
        flats: dict[Hashable, Flat] = {}
        for i in {*plan.due, *plan.active}:
            unit = plan.factors[i].placement.unit
            if unit not in flats:
                flats[unit] = self.flat(unit)
        weights = [w for w, _ in flats.values()]
        dtype = algebra_dtype(*(w.dtype for w in weights))
        device = weights[0].device
        self._assemble(plan, flats, group, dtype, device)

        buffer = torch.zeros(plan.numel, dtype=dtype, device=device)
        grams = {r: self._due_grams(plan, buffer, r) for r in plan.num_matrices}
        self._add_grams(plan.gram_blocks, flats, grams)
        for copies, which in ((plan.weight_copies, 0), (plan.grad_copies, 1)):
            for unit, c in copies.items():
                source = flats[unit][which]
                if source is not None:
                    buffer.index_copy_(
                        0, c.buffer.on(device), source[c.local.on(device)].to(dtype)
                    )
        buffer = self._all_reduce(buffer, group)
        grams = {r: self._due_grams(plan, buffer, r) for r in plan.num_matrices}
        self._add_grams(plan.late_gram_blocks, flats, grams)
        for rows in plan.weight_rows:
            cut = rows.view(buffer)
            grams[rows.rank].index_add_(0, rows.matrix.on(device), cut[:, :, None] * cut[:, None, :])

        inverses = self._invert(plan, grams, damping)
        self._apply(plan, flats, buffer, inverses)

    @staticmethod
    def _due_grams(plan: Plan, buffer: Tensor, rank: int) -> Tensor:
        count, offset = plan.num_due_matrices(rank), plan.gram_offset[rank]
        return buffer[offset : offset + count * rank * rank].view(count, rank, rank)

    @staticmethod
    def _add_grams(blocks: list[Block], flats: dict[Hashable, Flat], grams: dict[int, Tensor]) -> None:
        for b in blocks:
            target = grams[b.rank]
            target[b.index : b.index + b.count] += gram(b.view(flats[b.source][0]), target.dtype)

    def _invert(self, plan: Plan, grams: dict[int, Tensor], damping: Callable[[int], float]) -> dict[int, Tensor]:
        """The inverse of every due Gram matrix, with those of the carried ones behind them; remembers the due ones."""
        inverses = {}
        for rank, matrices in grams.items():
            due = [i for i in plan.due if plan.factors[i].rank == rank]
            # The Gram matrix of one factor preconditions the other: that one's group says with which damping.
            values = [damping(plan.factors[i].partner) for i in due]
            d: Tensor | float = values[0] if values else 0.0
            if any(v != d for v in values):
                per_matrix = [v for i, v in zip(due, values, strict=True) for _ in range(plan.factors[i].num_experts)]
                d = torch.tensor(per_matrix, dtype=matrices.dtype, device=matrices.device)
            inverse = damped_inverse(matrices, d)
            for i in due:
                self._inverses[i] = inverse[plan.matrix_of[i] : plan.matrix_of[i] + plan.factors[i].num_experts]
            carried = [self._inverses[i] for i in plan.carried if plan.factors[i].rank == rank]
            inverses[rank] = torch.cat([inverse, *carried]) if carried else inverse
        return inverses

    @staticmethod
    def _apply(plan: Plan, flats: dict[Hashable, Flat], buffer: Tensor, inverses: dict[int, Tensor]) -> None:
        for b in plan.apply_blocks:
            grad = flats[b.source][1]
            if grad is not None:
                precondition_(b.view(grad), inverses[b.rank][b.index : b.index + b.count])
        for rows in plan.grad_rows:
            cut = rows.view(buffer)
            matrices = inverses[rows.rank][rows.matrix.on(buffer.device)]
            cut.copy_(torch.bmm(cut[:, None, :], matrices)[:, 0])
        for unit, c in plan.grad_copies.items():
            grad = flats[unit][1]
            if grad is not None:
                values = buffer[c.buffer.on(buffer.device)].to(grad.dtype)
                grad.index_copy_(0, c.local.on(buffer.device), values)
        for i in plan.assembled:
            p = plan.factors[i].placement
            grad, whole = flats[p.unit][1], flats["assembled", i][1]
            if i in plan.active and grad is not None and whole is not None:
                grad[p.local_offset : p.local_offset + p.stop - p.start].copy_(whole[p.start : p.stop])

    def _assemble(
        self,
        plan: Plan,
        flats: dict[Hashable, Flat],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Phase 0: adds whole copies of the cut rank-first factors to `flats`, as sources of their own."""
        if not plan.assembled:
            return
        numels = [plan.factors[i].placement.numel for i in plan.assembled]
        buffer = torch.zeros(2 * sum(numels), dtype=dtype, device=device)
        parts = buffer.split([n for n in numels for _ in range(2)])
        for i, whole in zip(plan.assembled, zip(parts[::2], parts[1::2], strict=True), strict=True):
            p = plan.factors[i].placement
            for mine, target in zip(flats[p.unit], whole, strict=True):
                if mine is not None:
                    target[p.start : p.stop] = mine[p.local_offset : p.local_offset + p.stop - p.start]
        buffer = self._all_reduce(buffer, group)
        parts = buffer.split([n for n in numels for _ in range(2)])
        for i, weight, grad in zip(plan.assembled, parts[::2], parts[1::2], strict=True):
            flats["assembled", i] = (weight, grad)

    def _all_reduce(self, buffer: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None or dist.get_world_size(group) == 1 or not buffer.numel():
            return buffer
        there = buffer if self.comm_device is None else buffer.to(self.comm_device)
        dist.all_reduce(there, group=group)
        return there.to(buffer.device)
