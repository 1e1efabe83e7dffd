"""AdamW's step of what the compiled kernels have preconditioned, in the same pass over the gradient.

The kernels step whole rows of pairs; `CompiledAdamW` gives them AdamW's state, where and as torch's AdamW keeps it,
and has torch step what lies between: other parameters in a flat partition, padding, rows that a boundary cuts.
Parameters that the kernels did not touch at all are left to the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..core.kernels import AdamWState
from ..parallel.plan import Extents
from ..parallel.zero import Storage

OTHER_MODES = ("amsgrad", "maximize", "capturable", "differentiable")  # the kernels know none of them


class CompiledAdamW:
    """One step. `update(unit)` is asked by the preconditioner.

    Args:
        optimizer: torch's AdamW. storage: who holds its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, storage: Storage) -> None:
        self._optimizer, self._storage = optimizer, storage
        self._group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._states: dict[Hashable, AdamWState | None] = {}

    def __call__(self, unit: Hashable) -> AdamWState | None:
        """The state of a unit that has a gradient, its step count raised; None if torch shall step it."""
        if unit not in self._states:
            self._states[unit] = self._begin(unit)
        return self._states[unit]

    def _begin(self, unit: Hashable) -> AdamWState | None:
        if isinstance(unit, tuple):  # an assembled factor of the preconditioner's, no parameter
            return None
        p = self._storage.held(unit)
        group, state = self._group[id(p)], self._optimizer.state[p]
        if any(group.get(mode) for mode in OTHER_MODES):
            return None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        step, exp_avg, exp_avg_sq = (state[name] for name in ("step", "exp_avg", "exp_avg_sq"))
        if any(t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous() for t in (step, exp_avg, exp_avg_sq)):
            return None
        step += 1
        settings = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
        return AdamWState(p.detach().view(-1), exp_avg.view(-1), exp_avg_sq.view(-1), step, settings)

    @contextmanager
    def finished(self, stepped: Extents) -> Iterator[None]:
        """Steps what lies between the `stepped` elements, and hides the gradients of their units meanwhile."""
        held = [self._storage.held(unit) for unit in stepped]
        grads = [p.grad for p in held]
        for unit, p in zip(stepped, held, strict=True):
            gaps = complement(stepped[unit], p.numel())
            if gaps:
                self._step_gaps(unit, p.grad.view(-1), gaps)
            p.grad = None
        try:
            yield
        finally:
            for p, grad in zip(held, grads, strict=True):
                p.grad = grad

    def _step_gaps(self, unit: Hashable, grad: Tensor, gaps: Sequence[tuple[int, int]]) -> None:
        state = self._states[unit]
        assert state is not None
        lr, beta1, beta2, eps, weight_decay = state.settings
        params, grads, exp_avgs, exp_avg_sqs = (
            [t[start:end] for start, end in gaps] for t in (state.weight, grad, state.exp_avg, state.exp_avg_sq)
        )
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=[state.step - 1 for _ in gaps],  # raised there
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )


def complement(extents: Sequence[tuple[int, int]], numel: int) -> list[tuple[int, int]]:
    """The parts of range(numel) that lie in none of the disjoint `extents`."""
    ends = [0, *(end for _, end in sorted(extents))]
    starts = [*(start for start, _ in sorted(extents)), numel]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]
