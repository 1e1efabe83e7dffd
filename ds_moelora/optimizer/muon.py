"""GateRiemannianMuon: spectral descent on the product s B A, expert by expert (LoRA-Muon, arXiv 2606.12921).

With m_A, m_B the moving averages of the gradients, S_X the Gram matrix of factor X, R_X = (S_X + d I)^(-1/2), and
msign(X) = U V^T of X's singular value decomposition, in the storage of `preconditioner` (every row is one of m's):

    m  <-  momentum m + (1 - momentum) gradient
    dA  =  -lr / (2 s) msign(m_A R_B) R_B          dB  =  -lr / (2 s) msign(m_B R_A) R_A
    c   =  sqrt(1 - lr weight_decay)               X  <-  c X + dX / c

Both factors then change the product by lr / 2 at most, in the spectral norm, whatever its size and its split between
s, A and B. The step is every row of m times one r x r matrix (`preconditioner.spectral_matrices`) of four Gram matrices
per pair, of the factors and of m, which travel in the one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .base import GateRiemannian, Update, scaled
from .defaults import DAMPING, LEARNING_RATES
from .factors import Factor
from .groups import ParamGroup
from .kernels.rows import Extents, Kernels
from .preconditioner import spectral_matrices
from .sharding.exchange import Matrices
from .sharding.zero import Storage


class GateRiemannianMuon(GateRiemannian, torch.optim.AdamW):
    """Spectral descent on the product of gate-scaled LoRA pairs (arXiv 2606.12921), exact under ZeRO.

    4 bytes of state per element of a factor. All parameters outside LoRA pairs follow `torch.optim.AdamW` at `aux_lr`
    exactly; they become groups of their own, whose key `lr_scale` is aux_lr / lr: schedulers move both rates alike.

    Args:
        params: parameters or groups, among them the lora_A and lora_B of at least one tagged pair.
        lr: spectral norm of an expert's step s B A, greater than 0.
        momentum: of the moving average of gradients, from 0 to below 1; no Nesterov.
        weight_decay: of the product, decoupled, half of it on each factor; lr * weight_decay below 1. AdamW's for
            other parameters.
        damping: d in R_X, raised to eps_fp32 * trace(S_X) where that is larger. A's step is 0 while
            trace(B^T B) <= r d, as at the start, where B = 0.
        gate_scaling, scale_input_grad, gate_lr_scale: as in `GateRiemannianAdamW`.
        aux_lr, aux_betas, aux_eps: AdamW's for other parameters. In the groups: aux_lr, betas, eps.

        kernels: as in `GateRiemannianAdamW`; they multiply the rows, the rest is torch's.

    All but scale_input_grad and kernels can be set per parameter group.

    Raises:
        ValueError: no pairs, half a pair, an option out of range, a layer that another living optimizer holds at
            another gate scaling; at `step()`: see there.
    """

    _base = torch.optim.AdamW
    _needs_gradient_grams = True

    def __init__(
        self,
        params: Any,
        lr: float = LEARNING_RATES["GateRiemannianMuon"],
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        damping: float = DAMPING,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        aux_lr: float = 1e-3,
        aux_betas: tuple[float, float] = (0.9, 0.999),
        aux_eps: float = 1e-8,
        kernels: str = "auto",
    ) -> None:
        betas, eps = tuple(aux_betas), aux_eps  # torch's names
        del aux_betas, aux_eps
        self._construct(locals())

    @staticmethod
    def _settings(factor: Factor, group: ParamGroup) -> tuple[float, ...]:
        return group["damping"], 0.5 / abs(factor.pair.scaling), float(factor.role == "A")

    @classmethod
    def _matrices(cls, kernels: Kernels | None) -> Matrices:
        def matrices(
            grams: Tensor, of_m: Tensor, damping: Tensor | float, scale: Tensor | float, waits: Tensor | float
        ) -> Tensor:
            return scaled(spectral_matrices(grams, of_m, damping, waits), scale)

        return matrices

    @classmethod
    def _update(cls, storage: Storage, factor_units: set[Hashable], kernels: Kernels | None) -> Update | None:
        return SplitDecay(storage, factor_units)

    @staticmethod
    def _part(role: str | None, group: ParamGroup) -> tuple[str, float]:
        if role in ("A", "B"):
            return "", group.get("lr_scale", 1.0)
        scale = group["gate_lr_scale"] if role == "router" else 1.0
        ratio = group.get("lr_scale", group["aux_lr"] / group["lr"])
        return ("router", scale * ratio) if scale != 1.0 else ("rest", ratio)


class SplitDecay:
    """The element-wise update of factors: m becomes their gradient, and the products with it their step."""

    keeps_gradients = False

    def __init__(self, storage: Storage, units: set[Hashable]) -> None:
        self._storage, self._units = storage, units
        self._stepping: list[tuple[ParamGroup, list[Tensor]]] = []

    def begin(self, optimizer: torch.optim.Optimizer, units: set[Hashable]) -> None:
        present = {unit: self._storage.flat(unit)[1] is not None for unit in self._units & units}
        mine = {id(self._storage.held(unit)) for unit, has_gradient in present.items() if has_gradient}
        self._stepping = []
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if id(p) in mine]
            if not params:
                continue
            for p in params:
                if not optimizer.state[p]:  # `step` is what torch's AdamW expects of every state
                    optimizer.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
                optimizer.state[p]["step"] += 1
            averages, grads = [optimizer.state[p]["exp_avg"] for p in params], [p.grad for p in params]
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            torch._foreach_copy_(grads, averages)
            self._stepping.append((group, params))

    def state_of(self, unit: Hashable) -> None:
        return None

    @contextmanager
    def finished(self, done: Extents) -> Iterator[None]:
        hidden: list[tuple[Tensor, Tensor]] = []
        for group, params in self._stepping:
            steps = [p.grad for p in params if p.grad is not None]
            decay = math.sqrt(1 - float(group["lr"]) * group["weight_decay"])
            torch._foreach_mul_(params, decay)
            torch._foreach_add_(params, steps, alpha=-float(group["lr"]) / decay)
            hidden += zip(params, steps, strict=True)
        for p, _ in hidden:
            p.grad = None
        try:
            yield
        finally:
            for p, step in hidden:
                p.grad = step
