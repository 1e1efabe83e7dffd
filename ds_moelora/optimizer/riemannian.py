"""GateRiemannianAdamW and GateRiemannianSGD: torch's AdamW and SGD on Riemannian-preconditioned gradients.

Per expert, with G_A = A A^T and G_B = B^T B taken before the step (Sun et al., arXiv 2502.15828; Zhang & Pilanci,
arXiv 2402.02347):

    grad_A <- (G_B + d I)^-1 grad_A        grad_B <- grad_B (G_A + d I)^-1        d = max(damping, eps_fp32 * trace)

(both divided by s^2 with `include_scaling`), then torch's update, whose state has the same shape everywhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .base import GateRiemannian, Update, scaled
from .defaults import DAMPING, LEARNING_RATES
from .factors import Factor
from .groups import ParamGroup
from .kernels.adamw import FusedAdamW
from .kernels.rows import Kernels
from .preconditioner import damped_inverse
from .sharding.exchange import Matrices
from .sharding.zero import Storage


class _Preconditioned(GateRiemannian):
    """The inverse of the partner's damped Gram matrix."""

    @staticmethod
    def _settings(factor: Factor, group: ParamGroup) -> tuple[float, ...]:
        return group["damping"], factor.pair.scaling**-2 if group["include_scaling"] else 1.0

    @classmethod
    def _matrices(cls, kernels: Kernels | None) -> Matrices:
        def matrices(grams: Tensor, _: Tensor | None, damping: Tensor | float, scale: Tensor | float) -> Tensor:
            covered = kernels and kernels.covers(grams.shape[-1], False)
            invert = kernels.damped_inverse if kernels and covered else damped_inverse
            return scaled(invert(grams, damping), scale)

        return matrices


class GateRiemannianAdamW(_Preconditioned, torch.optim.AdamW):
    """AdamW on gate-scaled Riemannian-preconditioned gradients (gRAdamW of arXiv 2502.15828), exact under ZeRO.

    `m, v` are the moments of the preconditioned gradient; decoupled weight decay; bias correction; torch's fused
    kernel. Parameters outside LoRA pairs follow `torch.optim.AdamW` exactly.

    Args:
        params: parameters or groups, among them the lora_A and lora_B of at least one tagged pair.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. The paper uses lr 1e-5.
        damping: d in (G + d I)^-1, raised to eps_fp32 * trace(G) where that is larger.
        gate_scaling: factor on the gradient that reaches an expert's factors, given its gate g: "none" (g), "sqrt"
            (sqrt(g), the paper's choice) or "full" (1). Set in the layers as long as this optimizer lives.
        scale_input_grad: put the same factor on the gradient into the layer's input, as the published code does.
        gate_lr_scale: factor on the routers' learning rate (paper: 1e-3). Each group's routers become a group of their
            own with the key `lr_scale`, applied inside the step, whatever a scheduler writes into `lr`.
        include_scaling: divide both inverses by s^2, as the metric of s B A demands: the step of s B A then no longer
            depends on how it is split between s and the factors. False, as published, ignores s.
        kernels: who does the work on pairs, in one pass with AdamW's: "torch"; "cpp" (`optimizer.kernels.cpp`): float32
            on CPUs, CPU offload included; ranks 1, 2, 4, 8, 16; torch does other ranks; "auto" takes what can do it.
            But for torch, gradients are not overwritten.

    damping to include_scaling can be set per parameter group.

    Raises:
        ValueError: no pairs, half a pair, an option out of range, a layer that another living optimizer holds at
            another gate scaling, "cpp" without a compiler; at `step()`: see there.
    """

    _base = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float = LEARNING_RATES["GateRiemannianAdamW"],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = DAMPING,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        include_scaling: bool = False,
        kernels: str = "auto",
    ) -> None:
        betas = tuple(betas)  # type: ignore[assignment]
        self._construct(locals())

    @classmethod
    def _update(cls, storage: Storage, factor_units: set[Hashable], kernels: Kernels | None) -> Update | None:
        return FusedAdamW(storage.held, kernels) if kernels else None


class GateRiemannianSGD(_Preconditioned, torch.optim.SGD):
    """SGD on gate-scaled Riemannian-preconditioned gradients (gRSGD of arXiv 2502.15828), exact under ZeRO.

    Momentum and coupled weight decay as in `torch.optim.SGD`, which parameters outside LoRA pairs follow exactly.

    Args and errors: `lr` (the paper uses 3e-5), `momentum` and `weight_decay` as in `torch.optim.SGD`, the others as
    in `GateRiemannianAdamW`; the element-wise update is torch's whatever `kernels`.
    """

    _base = torch.optim.SGD
    # torch 2.13's fused SGD takes wrong steps with bf16 parameters on CPUs, and fails with momentum once a parameter
    # gets its first gradient after the others (tests/optimizer/test_optimizer.py has both cases).
    _fused_dtypes = frozenset()

    def __init__(
        self,
        params: Any,
        lr: float = LEARNING_RATES["GateRiemannianSGD"],
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = DAMPING,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        include_scaling: bool = False,
        kernels: str = "auto",
    ) -> None:
        self._construct(locals())
