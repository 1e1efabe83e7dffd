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

Tensors of rank level are (E*R, T), tokens last: the gates then multiply long rows rather than R neighbours, and dA and
dB are products of two row-major matrices.

Saved for it: x, p, the gates, one bool per token and expert, and the Parameters themselves. Never a (T, O)
tensor, and no copy of a parameter: under ZeRO-3 a saved copy would keep the gathered weight alive, while the
Parameter's data is fetched again before the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .pairs import GATE_SCALINGS, GateSettings


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
        compute: how the products are done: `DENSE` (None) or `core.grouped.GROUPED`. Same results up to rounding.
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


def gate_factor(gate_scaling: str, gates: Tensor, chosen: Tensor) -> Tensor:
    """The factor h on an expert's gradient: g ("none"), sqrt(g) ("sqrt") or 1 where chosen ("full").

    Args:
        gate_scaling: one of `GATE_SCALINGS`.
        gates: (T, E). chosen: (T, E) bool.

    Returns:
        (T, E) in the dtype of `gates`.
    """
    if gate_scaling == "none":
        return gates
    if gate_scaling == "sqrt":
        return gates.sqrt()
    if gate_scaling == "full":
        return chosen.to(gates.dtype)
    raise ValueError(f"gate_scaling={gate_scaling!r} is unknown; use one of {', '.join(GATE_SCALINGS)}.")


_NOTHING = contextlib.nullcontext()


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off inside: its rules are for torch's own functions."""
    # The dtypes are chosen here, once; autocast would cast the float32 parts of the gates again.
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


# The stacked copies of frozen factors: all that decoding one token would do with them is copy them again.
_of_frozen = WeakTensorKeyDictionary()


def _stack(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, F, R) -> (E*R, F): one small copy per use, which the cast to the compute dtype makes anyway.

    Of a Parameter without `requires_grad`, as PEFT loads adapters for inference, the copy is kept. Of one that is
    trained it is not, and an older one is dropped: optimizers write to `.data` without any trace.
    """
    if factors.requires_grad:
        _of_frozen.pop(factors, None)
    if factors.requires_grad or not isinstance(factors, nn.Parameter) or factors.is_inference():
        return factors.to(dtype).transpose(1, 2).reshape(-1, factors.shape[1])
    state = (factors._version, factors.data_ptr(), factors.shape, dtype)
    kept = _of_frozen.get(factors)
    if kept is None or kept[0] != state:
        kept = _of_frozen[factors] = (state, factors.detach().to(dtype).transpose(1, 2).flatten(0, 1).contiguous())
    return kept[1]


def _unstack(stacked: Tensor, rank: int) -> Tensor:
    """(E*R, F) -> (E, F, R), a view."""
    return _expert_rows(stacked, rank).transpose(1, 2)


def _expert_rows(stacked: Tensor, rank: int) -> Tensor:
    """(E*R, T) -> (E, R, T), a view."""
    return stacked.view(len(stacked) // rank, rank, stacked.shape[1])  # not -1: there may be no tokens


def _by_expert(values_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, E) -> (E, 1, T), contiguous: what every rank component of an expert is multiplied by."""
    return values_TE.t().to(dtype, memory_format=torch.contiguous_format).unsqueeze(1)


def _scale(projection: Tensor, factor: Tensor, rank: int) -> Tensor:
    """Multiplies expert e's R rows of (E*R, T) by row e of (E, 1, T); of a shared (R, T), every expert has them all."""
    return (_expert_rows(projection, rank) * factor).flatten(0, 1)


def _token_rows(rows: Tensor) -> Tensor:
    """(N, T) -> (T, N), copied: a product with a transposed view takes up to three times as long in bfloat16."""
    return rows.t().contiguous()


def _sum_shared(gradient: Tensor, num_A: int, rank: int) -> Tensor:
    """(E*R, T), the gradient of each expert's projection -> (num_A*R, T), that of the projections by `num_A` As."""
    if len(gradient) == num_A * rank:
        return gradient
    return _expert_rows(gradient, rank).sum(0)


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    x: bool
    gates: bool
    A: bool
    B: bool


class MixtureGrads(NamedTuple):
    """Gradients of one mixture: dx (T, I), dA like lora_A, dB (E, O, R) in the compute dtype, dgates (T, E), and
    drouter (E, I) with a `RouterStep`.

    None where not needed. dA and dB need not be contiguous. dgates is right where an expert was chosen; elsewhere it
    is never read, since those gates are constants.
    """

    dx: Tensor | None
    dgates: Tensor | None
    dA: Tensor | None
    dB: Tensor | None
    drouter: Tensor | None = None


class RouterStep(NamedTuple):
    """The router, where a backward pass is to do its part, too.

    Args:
        weight: (E, I). backward: (T, E) gradient of the gates -> that of the logits, computed from W x.
    """

    weight: Tensor
    backward: Callable[[Tensor], Tensor]


class ExpertCompute(NamedTuple):
    """One way to do the mixture's products, without autograd; callers save for backward what `forward` was given.

    Args:
        name: "dense" or "grouped".
        forward: (base_out, x, gates, chosen, lora_A, lora_B, scaling, inplace) -> (y, p). x has the dtype of base_out;
            p is whatever `backward` wants back, one tensor.
        backward: (dy, x, p, gates, chosen, lora_A, lora_B, scaling, settings, needs, onto=None, router=None) ->
            `MixtureGrads`. x may be None unless `needs.A`. dx is added in place onto `onto`, if there is one. With
            `router`, a `RouterStep`, `needs.gates` is set; dx then has the router's share, and `needs.A` covers its
            weight.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., MixtureGrads]


def _dense_forward(
    base_out: Tensor,
    x: Tensor,
    gates: Tensor,
    chosen: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    dtype = base_out.dtype
    p = _stack(lora_A, dtype) @ x.t()
    weighted = _token_rows(_scale(p, _by_expert(gates * scaling, dtype), lora_B.shape[2]))
    B = _stack(lora_B, dtype)
    y = base_out.addmm_(weighted, B) if inplace else torch.addmm(base_out, weighted, B)
    return y, p


def _dense_backward(
    dy: Tensor,
    x: Tensor | None,
    p: Tensor,
    gates: Tensor,
    chosen: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    settings: GateSettings,
    needs: Needs,
    onto: Tensor | None = None,
    router: RouterStep | None = None,
) -> MixtureGrads:
    s, dtype, (num_A, _, R) = scaling, p.dtype, lora_A.shape
    dx = dgates = dA = dB = drouter = None
    h = _by_expert(gate_factor(settings.gate_scaling, gates, chosen) * s, dtype)
    if needs.x or needs.gates or needs.A:
        q = _stack(lora_B, dtype) @ dy.t()
    if needs.gates:
        # Summed in float32: it is the router's whole signal, and a difference of nearly equal terms.
        dgates = ((_expert_rows(q, R) * _expert_rows(p, R).to(gates.dtype)).sum(1) * s).t()
    # The logits are E more projections of x: their gradient and the router's weight join the experts' products.
    below, weight_below = [], []
    if router is not None and dgates is not None:
        below, weight_below = [router.backward(dgates).t().to(dtype)], [router.weight.to(dtype)]

    def projections(factor: Tensor) -> Tensor:
        return torch.cat([_sum_shared(_scale(q, factor, R), num_A, R), *below])

    same = settings.gate_scaling == "none" or settings.scale_input_grad
    if needs.x:
        exact = projections(h if same else _by_expert(gates * s, dtype))
        weights = torch.cat([_stack(lora_A, dtype), *weight_below])
        dx = _token_rows(exact) @ weights if onto is None else onto.addmm_(_token_rows(exact), weights)
    if needs.A:
        assert x is not None
        gradients = (exact if same and needs.x else projections(h)) @ x
        dA, drouter = _unstack(gradients[: num_A * R], R), gradients[num_A * R :] if below else None
    if needs.B:
        dB = _unstack(_scale(p, h, R) @ dy, R)
    return MixtureGrads(dx, dgates, dA, dB, drouter)


DENSE = ExpertCompute("dense", _dense_forward, _dense_backward)


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that records a graph.

    torch's once_differentiable would let a gradient without a graph pass if dy is a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "MoE-LoRA has no second derivative (gate-scaled gradients are not the gradient of any function); call "
            "backward without create_graph=True."
        )


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
            dA = None if grads.dA is None else grads.dA.to(lora_A.dtype).contiguous()
            dB = None if grads.dB is None else grads.dB.to(lora_B.dtype).contiguous()
        return dy if needs_base else None, dx, grads.dgates, None, dA, dB, *[None] * 5
