"""What one optimizer step did to the pairs, measured when somebody asks for it (`optimizer.statistics = ...`)."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import torch.distributed as dist
from torch import Tensor

from .factors import Factor
from .groups import expert_group_name
from .preconditioner import condition_numbers, damped_inverse
from .sharding.exchange import ShardedPreconditioner
from .sharding.zero import Storage


class StepStatistics:
    """Squared norms over all factors of pairs, of this process's part: sums over processes are the whole's.

    An optimizer whose `statistics` is such an object calls it three times per call of `step()`; the sums go on over
    several calls (one per parameter group, or sub-group of ZeRO-3). Everything stays on the device. The weights before
    the step are kept until it is done: 4 bytes per element that the process owns, for the moment.

    Attributes:
        raw, preconditioned: of the gradients before and after preconditioning. weight: before the step.
        update: of the weights' change. condition: the largest `preconditioner.condition_numbers` of this process.
            0-dim tensors; None before the first step.
    """

    raw: Tensor | None = None
    preconditioned: Tensor | None = None
    weight: Tensor | None = None
    update: Tensor | None = None
    condition: Tensor | None = None

    @torch.no_grad()
    def begin(
        self,
        preconditioner: ShardedPreconditioner,
        storage: Storage,
        units: set[Hashable],
    ) -> None:
        """Before the gradients of `units` are preconditioned."""
        self._old = {unit: storage.flat(unit)[0].clone() for unit in sorted(units, key=str)}
        self._new = {unit: storage.flat(unit)[0] for unit in self._old}
        # Equal shares: what several processes hold alike counts once in their sum.
        self._slices: dict[float, list[tuple[Hashable, slice]]] = {}
        for factor, place in zip(preconditioner.factors, preconditioner.places, strict=True):
            if place.unit in units and place.start < place.stop:
                share = 1.0 if storage.sharded else 1 / _copies(factor)
                where = slice(place.local_offset, place.local_offset + place.stop - place.start)
                self._slices.setdefault(share, []).append((place.unit, where))
        self._grads = {unit: grad for unit in self._old if (grad := storage.flat(unit)[1]) is not None}
        self.raw = self._add(self.raw, self._grads)
        self.weight = self._add(self.weight, self._old)
        preconditioner.watch = self._saw

    @torch.no_grad()
    def after_preconditioning(self) -> None:
        self.preconditioned = self._add(self.preconditioned, self._grads)

    @torch.no_grad()
    def end(self) -> None:
        """After the weights have moved."""
        for unit, old in self._old.items():
            old.neg_().add_(self._new[unit])
        self.update = self._add(self.update, self._old)
        self._old, self._new, self._grads = {}, {}, {}

    def _saw(self, grams: Tensor, damping: Tensor | float) -> None:
        if len(grams):
            largest = condition_numbers(grams, damping, damped_inverse(grams, damping)).max()
            self.condition = largest if self.condition is None else torch.maximum(self.condition, largest)

    def _add(self, total: Tensor | None, flats: dict[Hashable, Tensor]) -> Tensor | None:
        for share, slices in self._slices.items():
            parts = [flats[unit][where] for unit, where in slices if unit in flats]
            if parts:
                norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32))
                squares = norms.square().sum() * share
                total = squares if total is None else total + squares
        return total


def _copies(factor: Factor) -> int:
    """Processes that hold this factor, where nothing is partitioned."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    ep_size = int(expert_group_name(factor.param).removeprefix("ep_size_") or 1)
    return dist.get_world_size() // ep_size
