"""The dense products (`mixture.dense`), with all that lies between two of them compiled by torch.compile.

Between its matrix products a mixture does some thirty operations on tensors of rank level: small ones, each of which
costs a GPU a launch and a pass. Here they are two functions, one of the forward and one of the backward pass, which
torch.compile turns into a few kernels. Shape suffixes and formulas: `mixture.moe_lora`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..pairs import GateSettings
from .compute import ExpertCompute, MixtureGrads, Needs, RouterStep, gate_factor, products_gradient
from .dense import expert_rows, factor_gradients, send_down, stack, unstack


def _weighted(p: Tensor, gates: Tensor, scaling: float, rank: int) -> Tensor:
    """(T, E*R): s g p, tokens first."""
    factor = (gates * scaling).t().to(p.dtype).unsqueeze(1)
    return (expert_rows(p, rank) * factor).flatten(0, 1).t().contiguous()


def _between(
    q: Tensor,
    p: Tensor,
    gates: Tensor,
    chosen: Tensor,
    dlogits: Tensor | None,
    temperature: float,
    scaling: float,
    num_A: int,
    rank: int,
    gate_scaling: str,
    scale_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From q = B dy (E*R, T) to the factors of the three products that follow.

    Args:
        dlogits, temperature: those of a `RouterStep`; None: there is none, and so no rows for it.
        num_A, rank: of lora_A (num_A, I, R), whose I makes no difference here.

    Returns:
        dgates (T, E). For dx: s g q, tokens first (T, num_A*R + E). For dA: s h q (num_A*R + E, T). For dB: s h p
        (E*R, T).
    """
    q_ERT, p_ERT, dtype = expert_rows(q, rank), expert_rows(p, rank), p.dtype
    dgates = ((q_ERT * p_ERT.to(gates.dtype)).sum(1) * scaling).t()
    below = [] if dlogits is None else [products_gradient(dlogits, gates, dgates, temperature).t().to(dtype)]

    def factor(values_TE: Tensor) -> Tensor:
        return (values_TE * scaling).t().to(dtype).unsqueeze(1)

    def rows(factor_E1T: Tensor) -> Tensor:
        scaled = q_ERT * factor_E1T
        return torch.cat([scaled.flatten(0, 1) if num_A == len(scaled) else scaled.sum(0), *below])

    h = factor(gate_factor(gate_scaling, gates, chosen))
    ours = rows(h)
    exact = ours if gate_scaling == "none" or scale_input_grad else rows(factor(gates))
    return dgates, exact.t().contiguous(), ours, (p_ERT * h).flatten(0, 1)


@functools.cache
def _compiled(function: Callable[..., Any], *kind: Hashable) -> Callable[..., Any]:
    """The function compiled for one kind of adapter (E, R, dtype, ...), and within it for any number of tokens.

    torch gives up after a few compilations of the same code: every kind has a copy of it.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True)  # fullgraph: what cannot be compiled whole is an error


def _forward(
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
    p = stack(lora_A, dtype) @ x.t()
    num_experts, _, rank = lora_B.shape
    weigh = _compiled(_weighted, num_experts, rank, len(lora_A), dtype)
    weighted, B = weigh(p, gates, scaling, rank), stack(lora_B, dtype)
    return base_out.addmm_(weighted, B) if inplace else torch.addmm(base_out, weighted, B), p


def _backward(
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
    num_A, _, rank = lora_A.shape
    kind = (len(lora_B), rank, num_A, p.dtype, router is None, settings.gate_scaling, settings.scale_input_grad)
    dgates, exact, ours, scaled_p = _compiled(_between, *kind)(
        stack(lora_B, p.dtype) @ dy.t(),
        p,
        gates,
        chosen,
        None if router is None else router.dlogits,
        1.0 if router is None else router.temperature,
        scaling,
        num_A,
        rank,
        settings.gate_scaling,
        settings.scale_input_grad,
    )
    dx = send_down(exact, lora_A, router, onto) if needs.x else None
    dA, drouter = factor_gradients(ours, x, lora_A) if needs.A else (None, None)
    dB = unstack(scaled_p @ dy, lora_B) if needs.B else None
    return MixtureGrads(dx, dgates if needs.gates else None, dA, dB, drouter)


COMPILED = ExpertCompute("compiled", _forward, _backward)
