"""The mixture of low-rank experts as one autograd function, with its router or after it.

    y = base + s * sum_i g_i(x) B_i A_i x        g = route(W_r x / temperature), or given

The backward pass, with q_ti = B_i^T dy_t and h the factor that `GateSettings.gate_scaling` names (g, sqrt(g) or 1 for
a chosen expert):

    dA_i = s * sum_t h_ti x_t q_ti^T        dB_i = s * sum_t h_ti dy_t p_ti^T      (scaled)
    dg_ti = s * <q_ti, p_ti>                dx_t = s * sum_i g_ti A_i q_ti         (exact; h for g in dx on request)

and dA = sum_i dA_i for a shared A. Shape suffixes: `mixture.operands`.

Router, experts and (with `base_weight`) the frozen layer all send a gradient into x. Here they are added up in one
(T, I) buffer; autograd would allocate, fill and add one for each, which at these ranks costs more than the products.

Saved for backward: x, p, the gates (whose signs hold the choice, `mixture.routing.chosen_by`) and the Parameters. Never
a (T, O) tensor, and no copy of a parameter: under ZeRO-3 a saved copy would keep the gathered weight alive, while the
Parameter's data is fetched again before the backward pass.

How products are computed varies without changing any of this (`Products`: `mixture.dense`, `mixture.grouped`, and
`expert_parallel`, where tokens and experts lie on several processes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import DENSE
from .operands import Grads, Needs, Operands, Products, no_autocast


class Mixed(NamedTuple):
    """A mixture's output y (T, O); from a router also logits (T, E), differentiable, and the gates (T, E)."""

    y: Tensor
    logits: Tensor | None
    gates: Tensor | None


def mix(
    operands: Operands,
    base_out: Tensor,
    *,
    inplace: bool = False,
    base_weight: Tensor | None = None,
    products: Products = DENSE,
) -> Mixed:
    """y_t = base_t + s * sum_i g_ti B_i A_i x_t, with gate-scaled gradients for A and B.

    Args:
        operands: the mixture. Its x may have any floating dtype.
        base_out: (T, O), the frozen layer's output. Its dtype is the compute dtype.
        inplace: add onto `base_out` instead of allocating another (T, O) tensor. The caller vouches that nobody else
            reads `base_out`; autograd raises if it was saved for a backward pass.
        base_weight: (O, I), if `base_out` is x W^T (+ b) with frozen W and b, computed without autograd: the base
            layer's gradient dy W into x is then computed here, and the mixture's added onto it in the same buffer.
        products: how products are computed. Same results up to rounding.

    Returns:
        `Mixed`, y in the dtype of `base_out`; logits and gates are None where the gates were given.

    Raises:
        ValueError: an unknown `gate_scaling` (in the backward pass).
        RuntimeError: a second derivative is asked for; the scaled gradients have none.

    Source: Sun et al., arXiv 2502.15828, section 3 (the scaling); docs/architecture.md (why it is kept out of dx).
    """
    if not torch.is_grad_enabled():  # decoding: an autograd function would be a fifth of the time that a layer adds
        return _forward(operands, base_out, inplace, products)[0]
    o = operands
    tensors = (base_out, o.x, o.gates, o.router, o.lora_A, o.lora_B, base_weight)
    return Mixed(*_Mixture.apply(operands, products, inplace, *tensors))


def _forward(operands: Operands, base_out: Tensor, inplace: bool, products: Products) -> tuple[Mixed, Operands, Tensor]:
    """The output, the operands to be saved, and p."""
    logits, dtype = None, base_out.dtype
    with no_autocast(base_out):
        x, gates = operands.x.to(dtype), operands.gates
        if operands.router is not None and not products.routes:
            assert operands.rule is not None
            top_k, top_p, temperature = operands.rule
            logits = F.linear(x, operands.router.to(dtype))
            logits = logits if temperature == 1 else logits / temperature
            gates = products.route(logits, top_k, top_p)
        y, kept, p = products.forward(operands._replace(x=x, gates=gates), base_out, inplace)
        if operands.router is not None and products.routes:
            gates, kept = kept.gates, kept._replace(gates=None)
            E = len(operands.router)
            logits = p.narrow(1, p.shape[1] - E, E)
    return Mixed(y, logits, None if logits is None else gates), kept, p


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operands: Operands,
        products: Products,
        inplace: bool,
        base_out: Tensor,
        x: Tensor,
        gates: Tensor | None,
        router: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        base_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        mixed, kept, p = _forward(operands, base_out, inplace, products)
        if inplace:
            ctx.mark_dirty(base_out)
        if mixed.gates is not None:
            ctx.mark_non_differentiable(mixed.gates)
        ctx.set_materialize_grads(False)  # zeros for logits without a loss would be two launches
        ctx.products, ctx.x_dtype = products, x.dtype
        ctx.plain = {"scaling": operands.scaling, "rule": operands.rule, "settings": operands.settings}
        # x is needed for the gradients of A and the router alone: where both are frozen no activation is kept alive.
        needs_x = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        saved = (kept.x if needs_x else None, kept.gates, p, router, lora_A, lora_B, base_weight)
        ctx.save_for_backward(*saved, *(kept.pairs or ()))
        return mixed

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlogits: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's once_differentiable would let a constant dy pass
            raise RuntimeError(
                "MoE-LoRA has no second derivative (gate-scaled gradients are not the gradient of any function); call "
                "backward without create_graph=True."
            )
        x, gates, p, router, lora_A, lora_B, base_weight, *pairs = ctx.saved_tensors
        needs_base, needs_x, needs_gates, needs_router, needs_A, needs_B = ctx.needs_input_grad[3:9]
        if router is None:
            needs, dlogits = Needs(needs_x, needs_gates, needs_A, needs_B), None
        else:  # one product gives dA and drouter, and dx takes what the router sends
            factors = needs_A or needs_router
            needs = Needs(needs_x, needs_x or factors, factors, needs_B)
        if dy is None:  # a loss of the logits alone
            if dlogits is None:
                return (None,) * 10
            dy = dlogits.new_zeros(len(dlogits), lora_B.shape[1])
        operands = Operands(
            x=x, gates=gates, router=router, lora_A=lora_A, lora_B=lora_B, pairs=tuple(pairs), **ctx.plain
        )
        with no_autocast(dy):
            onto = dy @ base_weight.to(dy.dtype) if needs_x and base_weight is not None else None
            grads: Grads = ctx.products.backward(operands, p, dy, needs._replace(onto=onto, dlogits=dlogits))
            dx = None if grads.x is None else grads.x.to(ctx.x_dtype)
            drouter = grads.router.to(router.dtype) if needs_router and grads.router is not None else None
        dgates = grads.gates if router is None else None
        dA = grads.A if needs_A else None
        return None, None, None, dy if needs_base else None, dx, dgates, drouter, dA, grads.B, None
