"""AdamW's step of what kernels have preconditioned, in the same pass over the gradient.

The kernels step whole rows of pairs; `FusedAdamW` gives them AdamW's state, where and as torch's AdamW keeps it, and
has torch (on GPUs, the kernels) step what lies between: other parameters in a flat partition, padding, rows that a
boundary cuts. Parameters that the kernels did not touch at all are left to the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .rows import AdamWState, Extents, Kernels, extent_table

OTHER_MODES = ("amsgrad", "maximize", "differentiable")  # the kernels know none of them


class FusedAdamW:
    """The `base.Update` of torch's AdamW, as far as kernels do it.

    Args:
        held: unit -> the optimizer's own tensor of it. kernels: those that step the rows.
    """

    keeps_gradients = True

    def __init__(self, held: Callable[[Hashable], Tensor], kernels: Kernels) -> None:
        self._held, self._kernels = held, kernels
        self._states: dict[Hashable, AdamWState] = {}
        self._groups: dict[int, tuple[float, ...] | None] = {}  # None: a mode that kernels do not know
        self._state_of: dict[Tensor, dict[str, Any]] = {}
        self._gaps: dict[Hashable, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
        self._gap_table: tuple[list[Any], Tensor] | None = None

    def begin(self, optimizer: torch.optim.Optimizer, units: set[Hashable]) -> None:
        """Reads the groups' settings, which may change between steps."""
        self._groups, self._state_of = {}, optimizer.state
        for group in optimizer.param_groups:
            lr = group["lr"] if isinstance(group["lr"], Tensor) and not group["lr"].is_cpu else float(group["lr"])
            settings = (lr, *group["betas"], group["eps"], group["weight_decay"])
            known = settings if not any(group.get(mode) for mode in OTHER_MODES) else None
            for p in group["params"]:
                self._groups[id(p)] = known

    def state_of(self, unit: Hashable) -> AdamWState | None:
        """The state of a unit that has a gradient; None if torch shall step it."""
        if isinstance(unit, tuple):  # an assembled factor of the preconditioner's, no parameter
            return None
        p = self._held(unit)
        settings, state = self._groups[id(p)], self._state_of[p]
        if settings is None:
            return None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        found = self._states.get(unit)
        if (
            found is None
            or found.exp_avg is not state["exp_avg"]
            or found.exp_avg_sq is not state["exp_avg_sq"]
            or found.step is not state["step"]
            or p.dtype != torch.float32
        ):
            tensors = (p.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])
            if any(t.dtype != torch.float32 or t.device != p.device or not t.is_contiguous() for t in tensors):
                return None
            found = self._states[unit] = AdamWState(*tensors, settings)
        found.settings = settings
        if not p.is_cpu or found.weight.data_ptr() != p.data_ptr():  # `p.data` is another tensor now
            found.weight = p.detach()
        return found

    @contextmanager
    def finished(self, done: Extents) -> Iterator[None]:
        """Steps what lies between the `done` elements, counts, and hides the gradients of their units meanwhile."""
        held = [self._held(unit) for unit in done]
        grads: list[Any] = [p.grad for p in held]
        states = [self._states[unit] for unit in done]
        gaps = [self._complement(unit, done[unit], p.numel()) for unit, p in zip(done, held, strict=True)]
        if any(gaps) and hasattr(self._kernels, "step_extents_"):
            if self._gap_table is None or self._gap_table[0] != gaps:
                self._gap_table = (gaps, extent_table(gaps, held[0].device))
            self._kernels.step_extents_(self._gap_table[1], grads, states)
        else:
            for state, grad, between in zip(states, grads, gaps, strict=True):
                if between:
                    self._step_gaps(state, grad, between)
        for p in held:
            p.grad = None
        if done:
            torch._foreach_add_([state.step for state in states], 1)
        try:
            yield
        finally:
            for p, grad in zip(held, grads, strict=True):
                p.grad = grad

    def _complement(self, unit: Hashable, extents: list[tuple[int, int]], numel: int) -> list[tuple[int, int]]:
        known, gaps = self._gaps.get(unit, ([], []))
        if known != extents:
            gaps = complement(extents, numel)
            self._gaps[unit] = (list(extents), gaps)
        return gaps

    @staticmethod
    def _step_gaps(state: AdamWState, gradient: Tensor, gaps: Sequence[tuple[int, int]]) -> None:
        lr, beta1, beta2, eps, weight_decay = state.settings
        params, grads, exp_avgs, exp_avg_sqs = (
            [t.view(-1)[start:end] for start, end in gaps]
            for t in (state.weight, gradient, state.exp_avg, state.exp_avg_sq)
        )
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=[state.step.clone() for _ in gaps],  # counted up there
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
    extents = sorted(extents)
    ends = [0, *(end for _, end in extents)]
    starts = [*(start for start, _ in extents), numel]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]
