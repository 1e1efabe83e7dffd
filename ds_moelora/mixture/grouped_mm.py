"""The mixture's products over the chosen experts alone, on a GPU: no loop over experts, and no wait for the host.

The N = T*k pairs (token, chosen expert) are sorted by expert on the device, and each of the six products of
`mixture.grouped` is one `torch.nn.functional.grouped_mm` over all experts, whose offsets stay on the device. Between
them a pair is a token of one expert, so that the operators of `mixture.fused` serve here as well. A token's k rows are
added up in the order of the experts: the same bits on every run. Formulas and suffixes: `mixture.grouped`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import route_at_once
from .operands import Grads, Needs, Operands, Products, check_gate_scaling, through_router
from .routing import chosen_by


def why_not(rank: int, dtype: torch.dtype, top_p: float | None, num_A: int) -> str | None:
    """What `GROUPED_MM` does not cover on a GPU; None if it covers a mixture like this."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype != torch.bfloat16:
        return f"torch's grouped_mm multiplies bfloat16, not {dtype}"
    if rank % 8:
        return f"its rows have to be multiples of 16 bytes: r a multiple of 8, not {rank}"
    if top_p is not None:
        return "with top_p the device alone knows how many pairs there are"
    return "its experts share one A" if num_A == 1 else None


def sorted_pairs(gates: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """[expert, token] of all pairs (N, 2), sorted; each expert's end (E,), int32; each token's pairs (T, k); and the
    pairs' gates (N, 1).

    Args:
        gates: (T, E) as in `Operands`, of exactly `top_k` chosen experts per token.
    """
    chosen = chosen_by(gates)
    pairs = torch.nonzero_static(chosen.t(), size=len(gates) * top_k)
    offsets = chosen.sum(0).cumsum(0, dtype=torch.int32)
    expert, token = pairs.unbind(1)
    order = token.argsort(stable=True).view(len(gates), top_k)
    return pairs, offsets, order, torch.ops.aten.index.Tensor(gates, [token, expert]).unsqueeze(1)


def grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """The rows (or, of two matrices, columns and rows) of `left` up to each offset times that expert's `right`."""
    return F.grouped_mm(left, right, offs=offsets)


class _GroupedMM(Products):
    name = "grouped"
    route = staticmethod(route_at_once)

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        o, dtype = operands, base_out.dtype
        assert o.rule is not None
        sorted_by_expert = pairs, offsets, order, gate = sorted_pairs(o.token_gates(), o.rule.top_k)
        p = grouped_mm(o.x.index_select(0, pairs.select(1, 1)), o.lora_A.to(dtype), offsets)
        weighted = torch.empty_like(p)
        torch.ops.ds_moelora.gate_forward(p, gate, weighted, o.scaling, 0, None)
        rows = grouped_mm(weighted, o.lora_B.to(dtype).transpose(1, 2), offsets)
        y = base_out if inplace else base_out.clone()
        torch.ops.ds_moelora.combine(y, rows, order)
        return y, o._replace(pairs=sorted_by_expert), p

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        o, dtype = operands, p.dtype
        assert o.pairs is not None
        check_gate_scaling(o.settings.gate_scaling)
        (pairs, offsets, order, gate), A = o.pairs, o.lora_A.to(dtype)
        expert, token = pairs.unbind(1)
        dy_N = dy.index_select(0, token)
        q = grouped_mm(dy_N, o.lora_B.to(dtype), offsets) if needs.x or needs.gates or needs.A else None
        rows_x = torch.empty_like(p) if needs.x else None
        rows_A = torch.empty_like(p) if needs.A and not (o.scales_alike() and needs.x) else None
        weighted = torch.empty_like(p) if needs.B else None
        dgate = torch.empty_like(gate) if needs.gates else None
        torch.ops.ds_moelora.gate_backward(
            p, q, gate, None, rows_x, rows_A, weighted, dgate, o.scaling, 0, None,
            o.settings.gate_scaling, o.settings.scale_input_grad, 1, p.shape[1],
        )  # fmt: skip
        of_A = rows_x if rows_A is None else rows_A
        dB = None if weighted is None else grouped_mm(dy_N.t(), weighted, offsets).to(o.lora_B.dtype)
        dA = None
        if needs.A and of_A is not None:
            dA = grouped_mm(o.x.index_select(0, token).t(), of_A, offsets).to(o.lora_A.dtype)
        dx = dgates = None
        if dgate is not None:
            dgates = torch.zeros_like(o.token_gates()).index_put_((token, expert), dgate.squeeze(1))
        if rows_x is not None:
            rows = grouped_mm(rows_x, A.transpose(1, 2), offsets)
            dx = dy.new_zeros(len(dy), A.shape[1]) if needs.onto is None else needs.onto
            torch.ops.ds_moelora.combine(dx, rows, order)
        dx, drouter = through_router(o, dgates, dx, needs, dtype)
        return Grads(dx, dgates, dA, dB, drouter)


GROUPED_MM = _GroupedMM()
