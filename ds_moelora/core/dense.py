"""The mixture's products over all experts at once: a plain LoRA of rank E*R, scaled by the gates in between.

Shape suffixes and formulas: `core.moe_lora`. Tensors of rank level are (E*R, T), tokens last: the gates then multiply
long rows rather than R neighbours, and dA and dB are products of two row-major matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .compute import ExpertCompute, MixtureGrads, Needs, RouterStep, gate_factor
from .pairs import GateSettings

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
