"""The mixture together with its router, as one autograd function.

    y = base + s * sum_i g_i(x) B_i A_i x        g = route(W_r x / temperature)

Router, experts and (with `base_weight`) the frozen layer all send a gradient into x. Here they are added up in one
(T, I) buffer; autograd would allocate, fill and add one for each, which at these ranks costs more than the products.

Shape suffixes as in `mixture.moe_lora`. Saved for backward: x, p, the gates, in which the choice is, too
(`mixture.routing.chosen_by`), and the Parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pairs import GateSettings
from .compute import ExpertCompute, Needs, RouterStep, no_autocast, refuse_second_derivative
from .dense import DENSE
from .routing import chosen_by, route


def routed_moe_lora(
    base_out: Tensor,
    x: Tensor,
    router_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    top_k: int,
    top_p: float | None = None,
    temperature: float = 1.0,
    settings: GateSettings | None = None,
    inplace: bool = False,
    compute: ExpertCompute | None = None,
    base_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixture.moe_lora.moe_lora` with the gates that `mixture.routing.route` gives for the logits W_r x / temperature.

    Args:
        router_weight: (E, I), any floating dtype; its gradient comes back in it.
        top_k, top_p: see `route`. temperature: > 0.
        All else as in `moe_lora`.

    Returns:
        y (T, O); logits (T, E), differentiable, for auxiliary losses; chosen (T, E) bool.

    Raises:
        As `moe_lora`.
    """
    settings, compute, choice = settings or GateSettings(), compute or DENSE, (top_k, top_p, temperature)
    if not torch.is_grad_enabled():  # decoding: an autograd function would be a fifth of the time that a layer adds
        mixed = _forward(base_out, x, router_weight, lora_A, lora_B, scaling, choice, inplace, compute)
        return mixed.y, mixed.logits, mixed.chosen
    return _RoutedMoELoRA.apply(
        base_out, x, router_weight, lora_A, lora_B, base_weight, scaling, choice, settings, inplace, compute
    )


class _Mixed(NamedTuple):
    y: Tensor
    p: Tensor
    x: Tensor  # in the compute dtype
    logits: Tensor
    gates: Tensor
    chosen: Tensor


def _forward(
    base_out: Tensor,
    x: Tensor,
    router_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    choice: tuple[int, float | None, float],
    inplace: bool,
    compute: ExpertCompute,
) -> _Mixed:
    dtype, (top_k, top_p, temperature) = base_out.dtype, choice
    with no_autocast(x):
        x = x.to(dtype)
        logits = x @ router_weight.to(dtype).t()
        logits = logits if temperature == 1 else logits / temperature
        gates, chosen = route(logits, top_k, top_p)
        y, p = compute.forward(base_out, x, gates, chosen, lora_A, lora_B, scaling, inplace)
    return _Mixed(y, p, x, logits, gates, chosen)


class _RoutedMoELoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        router_weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        base_weight: Tensor | None,
        scaling: float,
        choice: tuple[int, float | None, float],
        settings: GateSettings,
        inplace: bool,
        compute: ExpertCompute,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed = _forward(base_out, x, router_weight, lora_A, lora_B, scaling, choice, inplace, compute)
        if inplace:
            ctx.mark_dirty(base_out)
        ctx.mark_non_differentiable(mixed.chosen)
        ctx.scaling, ctx.temperature, ctx.settings, ctx.compute = scaling, choice[2], settings, compute
        ctx.x_dtype = x.dtype
        saved_x = mixed.x if any(ctx.needs_input_grad[2:4]) else None
        ctx.save_for_backward(saved_x, mixed.p, mixed.gates, router_weight, lora_A, lora_B, base_weight)
        return mixed.y, mixed.logits, mixed.chosen

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlogits: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, p, gates, router_weight, lora_A, lora_B, base_weight = ctx.saved_tensors
        chosen = chosen_by(gates)
        needs_base, needs_x, needs_router, needs_A, needs_B = ctx.needs_input_grad[:5]
        # One product gives dA and drouter, and dx takes what the router sends.
        needs = Needs(needs_x, needs_x or needs_A or needs_router, needs_A or needs_router, needs_B)

        with no_autocast(dy):
            onto = dy @ base_weight.to(dy.dtype) if needs_x and base_weight is not None else None
            router = RouterStep(router_weight, dlogits, ctx.temperature) if needs.gates else None
            grads = ctx.compute.backward(
                dy, x, p, gates, chosen, lora_A, lora_B, ctx.scaling, ctx.settings, needs, onto, router
            )
            dx = None if grads.dx is None else grads.dx.to(ctx.x_dtype)
            drouter = grads.drouter.to(router_weight.dtype) if needs_router else None
        dA = grads.dA if needs_A else None
        return dy if needs_base else None, dx, drouter, dA, grads.dB, *[None] * 6
