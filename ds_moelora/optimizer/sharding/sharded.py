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

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.cpp import FLOAT, RANKS, AdamWState, Kernels, Update
from ..preconditioner import algebra_dtype, damped_inverse, gram, precondition_
from .plan import Blocks, Extents, Factor, Plan

Flat = tuple[Tensor, Tensor | None]  # a unit's local flat weights and their gradient


class ShardedPreconditioner:
    """Preconditions the gradients of pairs in place, on whatever part of them each rank owns.

    Args:
        factors: of all pairs, in an order equal on every rank.
        flat: unit -> (local flat weights, their gradient or None).
        comm_device: device on which the process groups communicate; None: where the weights are.
        kernels: do the work on rows, if their rank is among RANKS; None: torch does.

    Raises:
        ValueError: there is nothing that `kernels` can do.
    """

    def __init__(
        self,
        factors: list[Factor],
        flat: Callable[[Hashable], Flat],
        comm_device: torch.device | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.factors, self.flat, self.comm_device, self.kernels = factors, flat, comm_device, kernels
        # Called with (Gram matrices, damping, inverses of the damped ones), if somebody wants to look at them.
        self.watch: Callable[[Tensor, Tensor | float, Tensor], None] | None = None
        ranks = {f.rank for f in factors}
        if kernels is not None and not ranks & {*RANKS}:
            raise ValueError(
                f'"compiled": true would have no effect: there are pairs of rank {sorted(ranks)}, and compiled kernels '
                f'for {RANKS}; set "compiled": false, or use one of these ranks.'
            )
        self._plans: dict[tuple[int, frozenset[Hashable], frozenset[int]], Plan] = {}
        self._stepped: set[Hashable] = set()
        self._inverses: dict[int, Tensor] = {}
        self._constants: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self,
        units: set[Hashable],
        damping: Callable[[int], float],
        divisor: Callable[[int], float] = lambda _: 1.0,
        adamw: Callable[[Hashable], AdamWState | None] = lambda _: None,
    ) -> Extents:
        """Preconditions the gradients of `units`.

        A pair may lie in two units that are stepped one after the other (LoRA+ groups, small ZeRO-3 sub-groups). Both
        Gram matrices are then taken when the first of them is stepped, before any weight of the pair moves.

        Args:
            units: what this call of `optimizer.step()` updates. A unit seen again begins a new step.
            damping: factor index -> d for that factor's gradient.
            divisor: factor index -> what the inverse for that factor's gradient is divided by.
            adamw: unit -> its state, if the kernels shall step its rows at once; then these gradients stay as they are.

        Returns:
            what has been stepped: unit -> (start, end) of its elements.
        """
        stepped: Extents = {}
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
            stepped |= self._run(self._plans[plan_key], group, damping, divisor, adamw)
        return stepped

    def _run(
        self,
        plan: Plan,
        group: dist.ProcessGroup | None,
        damping: Callable[[int], float],
        divisor: Callable[[int], float],
        adamw: Callable[[Hashable], AdamWState | None],
    ) -> Extents:
        flats: dict[Hashable, Flat] = {}
        for i in {*plan.due, *plan.active}:
            unit = plan.factors[i].placement.unit
            if unit not in flats:
                flats[unit] = self.flat(unit)
        weights = [w for w, _ in flats.values()]
        dtype = algebra_dtype(*(w.dtype for w in weights))
        device = weights[0].device
        self._check_kernels(weights)
        self._assemble(plan, flats, group, dtype, device)

        buffer = torch.zeros(plan.numel, dtype=dtype, device=device)
        grams = {r: self._due_grams(plan, buffer, r) for r in plan.num_matrices}
        self._add_grams(plan.gram_blocks, flats, grams, device)
        for copies, which in ((plan.weight_copies, 0), (plan.grad_copies, 1)):
            for unit, c in copies.items():
                source = flats[unit][which]
                if source is not None:
                    buffer.index_copy_(0, c.buffer.on(device), source[c.local.on(device)].to(dtype))
        buffer = self._all_reduce(buffer, group)
        grams = {r: self._due_grams(plan, buffer, r) for r in plan.num_matrices}
        self._add_grams(plan.late_gram_blocks, flats, grams, device)
        for rows in plan.weight_rows:
            cut = rows.view(buffer)
            grams[rows.rank].index_add_(0, rows.matrix.on(device), cut[:, :, None] * cut[:, None, :])

        inverses = self._invert(plan, grams, damping, divisor)
        return self._apply(plan, flats, buffer, inverses, adamw)

    def _check_kernels(self, weights: list[Tensor]) -> None:
        """Raises a ValueError if the kernels cannot work on these weights."""
        for w in weights if self.kernels else []:
            if w.dtype != torch.float32 or not w.is_cpu:
                raise ValueError(
                    f'"compiled": true has kernels for float32 weights on CPUs, and the optimizer holds {w.dtype} on '
                    f'{w.device}; set "compiled": false.'
                )

    def _kernels_for(self, rank: int) -> Kernels | None:
        return self.kernels if rank in RANKS else None

    @staticmethod
    def _due_grams(plan: Plan, buffer: Tensor, rank: int) -> Tensor:
        count, offset = plan.num_due_matrices(rank), plan.gram_offset[rank]
        return buffer[offset : offset + count * rank * rank].view(count, rank, rank)

    def _add_grams(
        self, equal: list[Blocks], flats: dict[Hashable, Flat], grams: dict[int, Tensor], device: torch.device
    ) -> None:
        for blocks in equal:
            target = grams[blocks.rank]
            if kernels := self._kernels_for(blocks.rank):
                addresses = [flats[b.source][0].data_ptr() + FLOAT * b.offset for b in blocks.blocks]
                kernels.add_grams_(target, blocks.rows, addresses)
                continue
            sums = [gram(b.view(flats[b.source][0]), target.dtype) for b in blocks.blocks]
            target.index_add_(0, blocks.matrix.on(device), torch.cat(sums))

    def _invert(
        self,
        plan: Plan,
        grams: dict[int, Tensor],
        damping: Callable[[int], float],
        divisor: Callable[[int], float],
    ) -> dict[int, Tensor]:
        """The inverse of every due Gram matrix, with those of the carried ones behind them; remembers the due ones."""
        inverses = {}
        for rank, matrices in grams.items():
            due = [i for i in plan.due if plan.factors[i].rank == rank]
            # The Gram matrix of one factor preconditions the other: that one's group says with which damping.
            d, scale = (self._per_matrix(plan, due, setting, matrices) for setting in (damping, divisor))
            kernels = self._kernels_for(rank)
            inverse = kernels.damped_inverse(matrices, d) if kernels else damped_inverse(matrices, d)
            if self.watch is not None:
                self.watch(matrices, d, inverse)
            if not isinstance(scale, float) or scale != 1.0:
                inverse = inverse / (scale[:, None, None] if isinstance(scale, Tensor) else scale)
            for i in due:
                self._inverses[i] = inverse[plan.matrix_of[i] : plan.matrix_of[i] + plan.factors[i].num_experts]
            carried = [self._inverses[i] for i in plan.carried if plan.factors[i].rank == rank]
            inverses[rank] = torch.cat([inverse, *carried]) if carried else inverse
        return inverses

    def _per_matrix(self, plan: Plan, due: list[int], setting: Callable[[int], float], like: Tensor) -> Tensor | float:
        """A setting for the partners' gradients: a number if it is the same for all, else one for each Gram matrix."""
        values = tuple(setting(plan.factors[i].partner) for i in due)
        if all(value == values[0] for value in values):
            return float(values[0]) if values else 1.0
        counts = tuple(plan.factors[i].num_experts for i in due)
        key = (values, counts, like.dtype, like.device)
        if key not in self._constants:  # copied to the device once, not in every step
            repeated = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
            self._constants[key] = torch.tensor(repeated, dtype=like.dtype, device=like.device)
        return self._constants[key]

    def _apply(
        self,
        plan: Plan,
        flats: dict[Hashable, Flat],
        buffer: Tensor,
        inverses: dict[int, Tensor],
        adamw: Callable[[Hashable], AdamWState | None],
    ) -> Extents:
        stepped: Extents = {}
        for blocks in plan.apply_blocks:
            if kernels := self._kernels_for(blocks.rank):
                self._apply_compiled(kernels, blocks, flats, inverses[blocks.rank], adamw, stepped)
                continue
            ordered = inverses[blocks.rank][blocks.matrix.on(buffer.device)]
            for b, matrices in zip(blocks.blocks, ordered.split(blocks.counts), strict=True):
                grad = flats[b.source][1]
                if grad is not None:
                    precondition_(b.view(grad), matrices)
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
        return stepped

    @staticmethod
    def _apply_compiled(
        kernels: Kernels,
        blocks: Blocks,
        flats: dict[Hashable, Flat],
        inverses: Tensor,
        adamw: Callable[[Hashable], AdamWState | None],
        stepped: Extents,
    ) -> None:
        """Steps the blocks of units that have a state, and preconditions the gradients of the others."""
        addresses: list[int] = []
        updates: list[Update | None] = []
        for b in blocks.blocks:
            weight, grad = flats[b.source]
            state = None if grad is None else adamw(b.source)
            addresses.append(0 if grad is None else grad.data_ptr() + FLOAT * b.offset)
            updates.append(None if state is None else Update(weight, state, b.offset))
            if state is not None:
                stepped.setdefault(b.source, []).append((b.offset, b.end))
        kernels.precondition_(inverses, blocks.rows, addresses, updates)

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
