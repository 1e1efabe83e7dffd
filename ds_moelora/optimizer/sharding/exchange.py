"""The preconditioner on slices of flat partitions; the package's docstring has the phases and their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..factors import Factor
from ..kernels.rows import AdamWState, Extents, Kernels, RowBlocks
from ..preconditioner import algebra_dtype, gram, precondition_
from .placement import Placement
from .plan import GRAD, WEIGHT, Rows, StepPlan
from .zero import Flat

Units = Callable[[Hashable], Flat]
StateOf = Callable[[Hashable], AdamWState | None]
Matrices = Callable[..., Tensor]  # (partners' Gram matrices, gradients' or None, *settings) -> matrices


class ShardedPreconditioner:
    """Multiplies the gradients of pairs by one r x r matrix per expert, in place, on what each process owns of them.

    Args:
        factors: of all pairs, in an order equal in every process. places: of each of them.
        flat: unit -> (local flat weights, their gradient or None).
        matrices: what gradients are multiplied by, made of Gram matrices: see `base.GateRiemannian._matrices`.
        settings: factor index -> numbers that `matrices` wants for that factor's gradient, the damping first.
        gradient_grams: `matrices` needs the Gram matrices of the gradients, too.
        comm_device: device on which the process groups communicate; None: where the weights are.
        kernels: do the work on rows that they cover; None: torch does.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        places: Sequence[Placement],
        flat: Units,
        matrices: Matrices,
        settings: Callable[[int], tuple[float, ...]],
        gradient_grams: bool = False,
        comm_device: torch.device | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.factors, self.places, self.flat, self.comm_device = factors, places, flat, comm_device
        self.matrices, self.settings, self.gradient_grams, self.kernels = matrices, settings, gradient_grams, kernels
        # Called with (Gram matrices, damping), if somebody wants to look at them.
        self.watch: Callable[[Tensor, Tensor | float], None] | None = None
        self._plans: dict[tuple[int, frozenset[Hashable], frozenset[int]], StepPlan] = {}
        self._stepped: set[Hashable] = set()
        # Gram matrices (of all factors, first, number), of those whose partner is still to be stepped, too.
        self._grams: dict[int, tuple[Tensor, int, int]] = {}
        # Factors of one kind have the same settings: the first of each one's kind.
        kinds: dict[Any, int] = {}
        self._kinds = [kinds.setdefault((f.group, f.pair.scaling, f.role), i) for i, f in enumerate(factors)]
        self._constants: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def __call__(self, units: set[Hashable], adamw: StateOf = lambda _: None) -> Extents:
        """Multiplies the gradients of `units`.

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
            self._stepped, self._grams = set(), {}
        self._stepped |= units
        active = [i for i, place in enumerate(self.places) if place.unit in units]
        pairs = sorted({*active, *(self.factors[i].partner for i in active)})
        due = [i for i in pairs if i not in self._grams]
        groups = {id(self.places[i].group): self.places[i].group for i in pairs}
        for key, group in groups.items():
            plan_key = (key, frozenset(units), frozenset(due))
            if plan_key not in self._plans:
                mine = {i for i in pairs if id(self.places[i].group) == key}
                own_due, own_active = ([i for i in indices if i in mine] for indices in (due, active))
                plan = StepPlan(self.factors, self.places, own_due, own_active, self.gradient_grams)
                self._plans[plan_key] = plan
            call = GroupCall(self._plans[plan_key], self.flat, group, self.comm_device, self.kernels)
            stepped |= call.apply(self._row_matrices(call.plan, *call.grams()), adamw)
        return stepped

    def _row_matrices(
        self, plan: StepPlan, grams: dict[int, Tensor], gradient_grams: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """What the active gradients' rows are multiplied by, (N, r, r) by rank."""
        for rank, due in plan.weights.order.items():
            for i in due:
                wanted = plan.weights.wanted[i]
                self._grams[i] = grams[rank], wanted.start, len(wanted)
        found = {}
        for rank, active in plan.grads.order.items():
            earlier = (self._grams[i] for i in plan.carried if self.factors[i].rank == rank)
            carried = [table.narrow(0, first, number) for table, first, number in earlier]
            fresh = plan.grads.num[rank] - sum(map(len, carried))
            parts = [*([grams[rank].narrow(0, 0, fresh)] if rank in grams else []), *carried]
            partners = torch.cat(parts) if len(parts) > 1 else parts[0]
            damping, *others = self._per_matrix(active, plan.grads.wanted, partners)
            if self.watch is not None:
                self.watch(partners, damping)
            found[rank] = self.matrices(partners, gradient_grams.get(rank), damping, *others)
        return found

    def _per_matrix(self, active: Sequence[int], wanted: dict[int, range], like: Tensor) -> list[Tensor | float]:
        """Each setting: a number if it is the same for all gradients, else one for each of their `wanted` matrices."""
        found: list[Tensor | float] = []
        kinds = [self._kinds[i] for i in active]
        of_kind = {kind: self.settings(kind) for kind in dict.fromkeys(kinds)}
        for number, values in enumerate(zip(*of_kind.values(), strict=True)):
            if all(value == values[0] for value in values):
                found.append(float(values[0]))
                continue
            each = tuple(of_kind[kind][number] for kind in kinds)
            key = (each, tuple(len(wanted[i]) for i in active), like.dtype, like.device)
            if key not in self._constants:  # copied to the device once, not in every step
                repeated = [value for value, i in zip(each, active, strict=True) for _ in wanted[i]]
                self._constants[key] = torch.tensor(repeated, dtype=like.dtype, device=like.device)
            found.append(self._constants[key])
        return found


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
        # Roots of gradients' Gram matrices lose half of their digits: these are summed in float64.
        self.wide = plan.gradient_grams
        self.sum_dtype = torch.float64 if self.wide else self.dtype
        self.mover = self._mover() if plan.exchange.numel else None

    def _mover(self) -> Any:
        """The kernels that bring elements together for the exchange; None: torch does."""
        dtypes = {self.sum_dtype, *(flat.dtype for both in self.flats.values() for flat in both if flat is not None)}
        there = self.comm_device in (None, self.device) and dtypes == {torch.float32}
        return self.kernels if there and hasattr(self.kernels, "move_") else None

    def _new_tables(self) -> dict[Any, Tensor]:
        """Zeros, in one tensor: Gram matrices and cut rows, and what a mover sends and gets.

        A mover's stay where they are: its kernels find them by their addresses.
        """
        plan, both = self.plan, ((self.plan.weights, WEIGHT), (self.plan.grads, GRAD))
        shapes: dict[Any, tuple[int, ...]] = {
            **{(w, r, "grams"): (n, r * r) for rows, w in both for r, n in rows.sums.items()},
            **{(w, r, "rows"): (n, r) for rows, w in both for r, n in rows.cut.items()},
            **({name: (n,) for name, n in plan.exchange.buffers.items()} if self.mover is not None else {}),
        }
        sizes = [math.prod(shape) for shape in shapes.values()]
        kept = plan.kept if self.mover is not None else None
        if kept is None or kept.device != self.device:
            kept = torch.zeros(sum(sizes), dtype=self.sum_dtype, device=self.device)
            plan.kept = kept if self.mover is not None else None
        else:
            kept.zero_()
        parts = kept.split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def _exchange_by_kernels(self, mover: Any) -> None:
        plan = self.plan
        pack, unpack = plan.exchange.packing
        for moves in (plan.gathered, pack):
            mover.move_(moves, self._tensors(), self.device)
        plan.exchange.communicate(self.tables, self.group)
        mover.move_(unpack, self._tensors(), self.device)

    def _tensors(self) -> dict[Any, Tensor | None]:
        """What `Moves` name."""
        flats = {(which, unit): both[which] for unit, both in self.flats.items() for which in (WEIGHT, GRAD)}
        return {**self.tables, **flats}

    def grams(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Phases 0 to 2, and the outer products of phase 3: the wanted Gram matrices whole, by rank.

        Returns:
            those of the due factors, and those of the active gradients (none unless the plan has them).
        """
        plan, both = self.plan, ((self.plan.weights, WEIGHT), (self.plan.grads, GRAD))
        self._assemble()
        self.tables = tables = self._new_tables()
        for rows, which in both:
            self._add_grams(rows, rows.own, which)
        if self.mover is not None:
            self._exchange_by_kernels(self.mover)
        else:
            for rows, which in both:
                for (unit, rank), c in rows.copies.items():
                    source = self.flats[unit][which]
                    if source is not None:
                        values = source.index_select(0, c.local.on(self.device)).to(self.sum_dtype)
                        tables[which, rank, "rows"].view(-1).index_copy_(0, c.table.on(self.device), values)
            plan.exchange(tables, self.group, self.comm_device)
        for rows, which in both:
            self._add_grams(rows, rows.assembled, which)
            for rank in rows.cut:
                table = tables[which, rank, "rows"].view(-1)
                self.flats["cut", which, rank] = (table, table)
            self._add_grams(rows, list(rows.cut_blocks.values()), which)
        found = [
            {r: tables[w, r, "grams"].narrow(0, 0, rows.num[r]).view(-1, r, r) for r in rows.sums} for rows, w in both
        ]
        return found[WEIGHT], found[GRAD]

    def apply(self, matrices: dict[int, Tensor], adamw: StateOf) -> Extents:
        """The rest of phase 3: multiplies the gradient's rows by `matrices`, (N, r, r) by rank."""
        stepped: Extents = {}
        matrices = {rank: own.to(self.dtype) for rank, own in matrices.items()}
        cut = list(self.plan.grads.cut_blocks.values())
        for blocks in (*self.plan.grads.own, *self.plan.grads.assembled, *cut):
            known = not (self.wide and blocks in cut)
            if known and self.kernels and self.kernels.covers(blocks.rank, blocks.interleaved):
                self._apply_kernels(self.kernels, blocks, matrices[blocks.rank], adamw, stepped)
                continue
            ordered = matrices[blocks.rank].index_select(0, blocks.matrix.on(self.device))
            for b, own in zip(blocks.blocks, ordered.split(blocks.counts), strict=True):
                grad = self.flats[b.source][GRAD]
                if grad is not None:
                    precondition_(b.view(grad), own)
        self._return_cut_rows()
        for (which, _), experts in self.plan.assembled.items():
            for i, expert in experts if which == GRAD else []:
                grad, whole = self.flats[self.plan.places[i].unit][GRAD], self.flats["assembled", i, expert][GRAD]
                if grad is not None and whole is not None:
                    there, here = self.plan.own_part(i, expert)
                    grad[here].copy_(whole[there])
        return stepped

    def _add_grams(self, rows: Rows, equal: list[RowBlocks], which: int) -> None:
        """Adds the Gram matrices of blocks of weights or gradients to those of `rows`, if the plan wants them."""
        for blocks in equal if rows.sums else []:
            target = self.tables[which, blocks.rank, "grams"].view(-1, blocks.rank, blocks.rank)
            if self.kernels and self.kernels.covers(blocks.rank, blocks.interleaved) and not self.wide:
                self.kernels.add_grams_(target, blocks, [self.flats[unit][which] for unit in blocks.units])
                continue
            sources = [self.flats[b.source][which] for b in blocks.blocks]
            sums = [
                target.new_zeros(b.experts, b.rank, b.rank) if source is None else gram(b.view(source), target.dtype)
                for b, source in zip(blocks.blocks, sources, strict=True)
            ]
            target.index_add_(0, blocks.matrix.on(self.device), torch.cat(sums))

    def _return_cut_rows(self) -> None:
        if self.mover is not None:
            self.mover.move_(self.plan.returned, self._tensors(), self.device)
            return
        for (unit, rank), c in self.plan.grads.copies.items():
            grad = self.flats[unit][GRAD]
            if grad is not None:
                values = (
                    self.tables[GRAD, rank, "rows"].view(-1).index_select(0, c.table.on(self.device)).to(grad.dtype)
                )
                grad.index_copy_(0, c.local.on(self.device), values)

    def _apply_kernels(
        self, kernels: Kernels, blocks: RowBlocks, matrices: Tensor, adamw: StateOf, stepped: Extents
    ) -> None:
        """Steps the blocks of units that have a state, and preconditions the gradients of the others."""
        gradients = [self.flats[unit][GRAD] for unit in blocks.units]
        states = [None if g is None else adamw(unit) for g, unit in zip(gradients, blocks.units, strict=True)]
        for unit, state in zip(blocks.units, states, strict=True):
            if state is not None:
                stepped.setdefault(unit, []).extend(blocks.extents[unit])
        kernels.precondition_(matrices, blocks, gradients, states)

    def _assemble(self) -> None:
        """Phase 0: adds whole copies of the cut experts stored rank first to `flats`, as sources of their own."""
        plan = self.plan
        tables = {
            key: torch.zeros(len(experts), key[1], dtype=self.dtype, device=self.device)
            for key, experts in plan.assembled.items()
        }
        for (which, size), experts in plan.assembled.items():
            for (i, expert), whole in zip(experts, tables[which, size], strict=True):
                there, here = plan.own_part(i, expert)
                mine = self.flats[plan.places[i].unit][which]
                if mine is not None:
                    whole[there] = mine[here]
                weight, grad = self.flats.get(("assembled", i, expert), (whole, None))
                self.flats["assembled", i, expert] = (weight, whole if which == GRAD else grad)
        plan.assembly(tables, self.group, self.comm_device)
