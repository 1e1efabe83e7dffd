"""The preconditioner on slices of flat partitions; the package's docstring has the phases and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..factors import Factor
from ..kernels.cpp import FLOAT, RANKS, AdamWState, Extents, Kernels, Update
from ..preconditioner import algebra_dtype, damped_inverse, gram, precondition_
from .placement import Placement
from .plan import RowBlocks, StepPlan
from .zero import Flat

Units = Callable[[Hashable], Flat]
StateOf = Callable[[Hashable], AdamWState | None]
Watch = Callable[[Tensor, Tensor | float, Tensor], None]


class ShardedPreconditioner:
    """Preconditions the gradients of pairs in place, on whatever part of them each process owns.

    Args:
        factors: of all pairs, in an order equal in every process. places: of each of them.
        flat: unit -> (local flat weights, their gradient or None).
        damping: factor index -> d for that factor's gradient.
        divisor: factor index -> what the inverse for that factor's gradient is divided by.
        comm_device: device on which the process groups communicate; None: where the weights are.
        kernels: do the work on rows, if their rank is among RANKS; None: torch does.

    Raises:
        ValueError: there is nothing that `kernels` can do.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        places: Sequence[Placement],
        flat: Units,
        damping: Callable[[int], float],
        divisor: Callable[[int], float],
        comm_device: torch.device | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.factors, self.places, self.flat, self.comm_device = factors, places, flat, comm_device
        self.damping, self.divisor, self.kernels = damping, divisor, kernels
        # Called with (Gram matrices, damping, inverses of the damped ones), if somebody wants to look at them.
        self.watch: Watch | None = None
        ranks = {f.rank for f in factors}
        if kernels is not None and not ranks & {*RANKS}:
            raise ValueError(
                f'"compiled": true would have no effect: there are pairs of rank {sorted(ranks)}, and C++ kernels for '
                f'{RANKS}; set "compiled": false, or use one of these ranks.'
            )
        self._plans: dict[tuple[int, frozenset[Hashable], frozenset[int]], StepPlan] = {}
        self._stepped: set[Hashable] = set()
        self._matrices: dict[int, Tensor] = {}  # of factors whose partner is still to be stepped, too
        self._constants: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def __call__(self, units: set[Hashable], adamw: StateOf = lambda _: None) -> Extents:
        """Preconditions the gradients of `units`.

        A pair may lie in two units that are stepped one after the other (LoRA+ groups, small ZeRO-3 sub-groups). Both
        Gram matrices are then taken when the first of them is stepped, before any weight of the pair moves.

        Args:
            units: what this call of `optimizer.step()` updates. A unit seen again begins a new step.
            adamw: unit -> its state, if the kernels shall step its rows at once; then these gradients stay as they are.

        Returns:
            what has been stepped: unit -> (start, end) of its elements.
        """
        stepped: Extents = {}
        if self._stepped & units:
            self._stepped, self._matrices = set(), {}
        self._stepped |= units
        active = [i for i, place in enumerate(self.places) if place.unit in units]
        pairs = sorted({*active, *(self.factors[i].partner for i in active)})
        due = [i for i in pairs if i not in self._matrices]
        groups = {id(self.places[i].group): self.places[i].group for i in pairs}
        for key, group in groups.items():
            plan_key = (key, frozenset(units), frozenset(due))
            if plan_key not in self._plans:
                mine = {i for i in pairs if id(self.places[i].group) == key}
                parts = ([i for i in indices if i in mine] for indices in (due, active))
                self._plans[plan_key] = StepPlan(self.factors, self.places, *parts)
            call = GroupCall(self._plans[plan_key], self.flat, group, self.comm_device, self.kernels)
            stepped |= call.apply(self._row_matrices(call.plan, call.grams()), adamw)
        return stepped

    def _row_matrices(self, plan: StepPlan, grams: dict[int, Tensor]) -> dict[int, Tensor]:
        """What rows are multiplied by, by rank: made of the due Gram matrices; behind them those of earlier calls."""
        found = {}
        for rank, matrices in grams.items():
            due = plan.due_by_rank.get(rank, [])
            # The Gram matrix of one factor preconditions the other: that one's group says with which damping.
            d, scale = (self._per_matrix(due, setting, matrices) for setting in (self.damping, self.divisor))
            invert = self.kernels.damped_inverse if self.kernels and rank in RANKS else damped_inverse
            inverse = invert(matrices, d)
            if self.watch is not None:
                self.watch(matrices, d, inverse)
            if not isinstance(scale, float) or scale != 1.0:
                inverse = inverse / (scale[:, None, None] if isinstance(scale, Tensor) else scale)
            for i in due:
                first = plan.matrix_of[i]
                self._matrices[i] = inverse[first : first + self.factors[i].num_experts]
            carried = [self._matrices[i] for i in plan.carried_by_rank.get(rank, [])]
            found[rank] = torch.cat([inverse, *carried]) if carried else inverse
        return found

    def _per_matrix(self, due: list[int], setting: Callable[[int], float], like: Tensor) -> Tensor | float:
        """A setting for the partners' gradients: a number if it is the same for all, else one for each Gram matrix."""
        values = tuple(setting(self.factors[i].partner) for i in due)
        if all(value == values[0] for value in values):
            return float(values[0]) if values else 1.0
        counts = tuple(self.factors[i].num_experts for i in due)
        key = (values, counts, like.dtype, like.device)
        if key not in self._constants:  # copied to the device once, not in every step
            repeated = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
            self._constants[key] = torch.tensor(repeated, dtype=like.dtype, device=like.device)
        return self._constants[key]


class GroupCall:
    """One call's part within one process group: `grams`, then `apply`.

    Args:
        plan: what this process does. flat, comm_device, kernels: as in `ShardedPreconditioner`.
        group: None where nothing is partitioned.
    """

    def __init__(
        self,
        plan: StepPlan,
        flat: Units,
        group: dist.ProcessGroup | None,
        comm_device: torch.device | None,
        kernels: Kernels | None,
    ) -> None:
        self.plan, self.group, self.comm_device, self.kernels = plan, group, comm_device, kernels
        self.flats: dict[Hashable, Flat] = {unit: flat(unit) for unit in plan.units}
        weights = [weight for weight, _ in self.flats.values()]
        self.dtype, self.device = algebra_dtype(*(w.dtype for w in weights)), weights[0].device
        for w in weights if kernels else []:
            if w.dtype != torch.float32 or not w.is_cpu:
                raise ValueError(
                    f'"compiled": true has kernels for float32 weights on CPUs, and the optimizer holds {w.dtype} on '
                    f'{w.device}; set "compiled": false.'
                )

    def grams(self) -> dict[int, Tensor]:
        """Phases 0 to 2, and the outer products of phase 3: every due Gram matrix whole, by rank."""
        plan = self.plan
        self._assemble()
        self.buffer = torch.zeros(plan.numel, dtype=self.dtype, device=self.device)
        self._add_grams(plan.gram_blocks, self._due_grams())
        for copies, which in ((plan.weight_copies, 0), (plan.grad_copies, 1)):
            for unit, c in copies.items():
                source = self.flats[unit][which]
                if source is not None:
                    values = source[c.local.on(self.device)].to(self.dtype)
                    self.buffer.index_copy_(0, c.buffer.on(self.device), values)
        self.buffer = self._all_reduce(self.buffer)
        grams = self._due_grams()
        self._add_grams(plan.late_gram_blocks, grams)
        for rows in plan.weight_rows:
            cut = rows.view(self.buffer)
            grams[rows.rank].index_add_(0, rows.matrix.on(self.device), cut[:, :, None] * cut[:, None, :])
        return grams

    def apply(self, matrices: dict[int, Tensor], adamw: StateOf) -> Extents:
        """The rest of phase 3: multiplies the gradient's rows by `matrices`, (N, r, r) by rank."""
        stepped: Extents = {}
        for blocks in self.plan.apply_blocks:
            if self.kernels and blocks.rank in RANKS:
                self._apply_cpp(self.kernels, blocks, matrices[blocks.rank], adamw, stepped)
                continue
            ordered = matrices[blocks.rank][blocks.matrix.on(self.device)]
            for b, own in zip(blocks.blocks, ordered.split(blocks.counts), strict=True):
                grad = self.flats[b.source][1]
                if grad is not None:
                    precondition_(b.view(grad), own)
        self._apply_to_cut_rows(matrices)
        for i in self.plan.assembled:
            p = self.plan.places[i]
            grad, whole = self.flats[p.unit][1], self.flats["assembled", i][1]
            if i in self.plan.active and grad is not None and whole is not None:
                grad[p.local_offset : p.local_offset + p.stop - p.start].copy_(whole[p.start : p.stop])
        return stepped

    def _due_grams(self) -> dict[int, Tensor]:
        """Views of the buffer, (N, r, r) by rank."""
        found = {}
        for rank, count in self.plan.num_due.items():
            offset = self.plan.gram_offset[rank]
            found[rank] = self.buffer[offset : offset + count * rank * rank].view(count, rank, rank)
        return found

    def _add_grams(self, equal: list[RowBlocks], grams: dict[int, Tensor]) -> None:
        for blocks in equal:
            target = grams[blocks.rank]
            if self.kernels and blocks.rank in RANKS:
                addresses = [self.flats[b.source][0].data_ptr() + FLOAT * b.offset for b in blocks.blocks]
                self.kernels.add_grams_(target, blocks.layout, addresses)
                continue
            sums = [gram(b.view(self.flats[b.source][0]), target.dtype) for b in blocks.blocks]
            target.index_add_(0, blocks.matrix.on(self.device), torch.cat(sums))

    def _apply_to_cut_rows(self, matrices: dict[int, Tensor]) -> None:
        for rows in self.plan.grad_rows:
            cut = rows.view(self.buffer)
            own = matrices[rows.rank][rows.matrix.on(self.device)]
            cut.copy_(torch.bmm(cut[:, None, :], own)[:, 0])
        for unit, c in self.plan.grad_copies.items():
            grad = self.flats[unit][1]
            if grad is not None:
                values = self.buffer[c.buffer.on(self.device)].to(grad.dtype)
                grad.index_copy_(0, c.local.on(self.device), values)

    def _apply_cpp(
        self, kernels: Kernels, blocks: RowBlocks, matrices: Tensor, adamw: StateOf, stepped: Extents
    ) -> None:
        """Steps the blocks of units that have a state, and preconditions the gradients of the others."""
        addresses: list[int] = []
        updates: list[Update | None] = []
        for b in blocks.blocks:
            weight, grad = self.flats[b.source]
            state = None if grad is None else adamw(b.source)
            addresses.append(0 if grad is None else grad.data_ptr() + FLOAT * b.offset)
            updates.append(None if state is None else Update(weight, state, b.offset))
            if state is not None:
                stepped.setdefault(b.source, []).append((b.offset, b.end))
        kernels.precondition_(matrices, blocks.layout, addresses, updates)

    def _assemble(self) -> None:
        """Phase 0: adds whole copies of the cut rank-first factors to `flats`, as sources of their own."""
        plan = self.plan
        if not plan.assembled:
            return
        sizes = [plan.places[i].numel for i in plan.assembled for _ in range(2)]
        buffer = torch.zeros(sum(sizes), dtype=self.dtype, device=self.device)
        parts = buffer.split(sizes)
        for i, *whole in zip(plan.assembled, parts[::2], parts[1::2], strict=True):
            p = plan.places[i]
            for mine, target in zip(self.flats[p.unit], whole, strict=True):
                if mine is not None:
                    target[p.start : p.stop] = mine[p.local_offset : p.local_offset + p.stop - p.start]
        parts = self._all_reduce(buffer).split(sizes)
        for i, weight, grad in zip(plan.assembled, parts[::2], parts[1::2], strict=True):
            self.flats["assembled", i] = (weight, grad)

    def _all_reduce(self, buffer: Tensor) -> Tensor:
        if self.group is None or dist.get_world_size(self.group) == 1 or not buffer.numel():
            return buffer
        there = buffer if self.comm_device is None else buffer.to(self.comm_device)
        dist.all_reduce(there, group=self.group)
        return there.to(buffer.device)
