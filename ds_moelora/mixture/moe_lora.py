"""The mixture of low-rank experts as one autograd function: two matrix products over all experts, each way.

    y = base + s * sum_i g_i(x) B_i A_i x

Shape suffixes: T tokens, I input features, O output features, E experts, R rank of one expert. Experts are stored as
`lora_A` (E, I, R) and `lora_B` (E, O, R); side by side they are one (I, E*R) and one (E*R, O) matrix, so that all
experts together are a plain LoRA of rank E*R whose projection `p = x A` is scaled by the gates in between. `lora_A` may
also be (1, I, R): one A that all experts share, whose projection each expert scales by its own gate.

The backward pass, with q_ti = B_i^T dy_t and h the factor that `GateSettings.gate_scaling` names (g, sqrt(g) or 1 for
a chosen expert):

    dA_i = s * sum_t h_ti x_t q_ti^T        dB_i = s * sum_t h_ti dy_t p_ti^T      (scaled)
    dg_ti = s * <q_ti, p_ti>                dx_t = s * sum_i g_ti A_i q_ti         (exact; h for g in dx on request)

and dA = sum_i dA_i for a shared A.

Saved for it: x, p, the gates, one bool per token and expert, and the Parameters themselves. Never a (T, O)
tensor, and no copy of a parameter: under ZeRO-3 a saved copy would keep the gathered weight alive, while the
Parameter's data is fetched again before the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pairs import GateSettings
from .compute import ExpertCompute, Needs, no_autocast, refuse_second_derivative
from .dense import DENSE


def moe_lora(
    base_out: Tensor,
    x: Tensor,
    gates: Tensor,
    chosen: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    settings: GateSettings | None = None,
    inplace: bool = False,
    compute: ExpertCompute | None = None,
    base_weight: Tensor | None = None,
) -> Tensor:
    """y_t = base_t + s * sum_i g_ti B_i A_i x_t, with gate-scaled gradients for A and B.

    Args:
        base_out: (T, O), the frozen layer's output. Its dtype is the compute dtype.
        x: (T, I), the experts' input, any floating dtype.
        gates: (T, E), zero where an expert is not chosen.
        chosen: (T, E) bool, each token's experts; any number of them.
        lora_A: (E, I, R), or (1, I, R): shared. lora_B: (E, O, R). Any floating dtype; their gradients come back in it.
        scaling: s.
        settings: how A's and B's gradients (and x's, on request) are scaled. Read when the backward pass runs, since
            the optimizer that sets it is built after the model. None: exact gradients.
        inplace: add onto `base_out` instead of allocating another (T, O) tensor. The caller vouches that nobody else
            reads `base_out`; autograd raises if it was saved for a backward pass.
        compute: how the products are done: `DENSE` (None) or `mixture.grouped.GROUPED`. Same results up to rounding.
        base_weight: (O, I), if `base_out` is x W^T (+ b) with frozen W and b, computed without autograd: the base
            layer's gradient dy W into x is then computed here, and the mixture's added onto it in the same buffer.

    Returns:
        (T, O) in the dtype of `base_out`.

    Raises:
        ValueError: an unknown `gate_scaling` (in the backward pass).
        RuntimeError: a second derivative is asked for; the scaled gradients have none.

    Source: Sun et al., arXiv 2502.15828, section 3 (the scaling); docs/architecture.md (why it is kept out of dx).
    """
    settings, compute = settings or GateSettings(), compute or DENSE
    return _MoELoRA.apply(base_out, x, gates, chosen, lora_A, lora_B, scaling, settings, inplace, compute, base_weight)


class _MoELoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        gates: Tensor,
        chosen: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        settings: GateSettings,
        inplace: bool,
        compute: ExpertCompute,
        base_weight: Tensor | None,
    ) -> Tensor:
        with no_autocast(x):
            x_compute = x.to(base_out.dtype)
            y, p = compute.forward(base_out, x_compute, gates, chosen, lora_A, lora_B, scaling, inplace)
        if inplace:
            ctx.mark_dirty(base_out)
        ctx.scaling, ctx.settings, ctx.x_dtype, ctx.compute = scaling, settings, x.dtype, compute
        # x is needed for dA alone: a frozen A keeps no activation alive.
        saved_x = x_compute if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(saved_x, p, gates, chosen, lora_A, lora_B, base_weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, p, gates, chosen, lora_A, lora_B, base_weight = ctx.saved_tensors
        needs_base, needs_x, needs_gates, _, needs_A, needs_B = ctx.needs_input_grad[:6]
        needs = Needs(needs_x, needs_gates, needs_A, needs_B)
        with no_autocast(dy):
            onto = dy @ base_weight.to(dy.dtype) if needs_x and base_weight is not None else None
            grads = ctx.compute.backward(
                dy, x, p, gates, chosen, lora_A, lora_B, ctx.scaling, ctx.settings, needs, onto
            )
            dx = None if grads.dx is None else grads.dx.to(ctx.x_dtype)
        return dy if needs_base else None, dx, grads.dgates, None, grads.dA, grads.dB, *[None] * 5
