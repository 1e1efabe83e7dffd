"""The mixture's products over the chosen experts alone: T*k rows instead of T*E.

Shape suffixes as in `mixture.operands`, and N: the pairs (token, chosen expert), sorted by expert: T*k of them, fewer
with top-p routing. With e, t the expert and the token of pair n:

    p_n = A_e^T x_t      y_t += s g_te B_e p_n      q_n = B_e^T dy_t
    dA_e = s sum_n h_te x_t q_n^T      dB_e = s sum_n h_te dy_t p_n^T
    dg_te = s <q_n, p_n>      dx_t += s g_te A_e q_n

A `lora_A` that all experts share, (1, I, R), is one matrix for all N rows.

FLOPs fall by E/k against the dense form; the price is a loop over experts, each of which gathers its rows of x, y and
dy and scatters them again. A token occurs at most once among an expert's rows, so sums are in the order of the experts:
the same on every run. The rows per expert are read on the host: one synchronisation per pass on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .operands import Grads, Needs, Operands, Products, through_router
from .routing import chosen_by


def _rows(chosen: Tensor) -> Iterator[tuple[int, Tensor, slice]]:
    """(expert, its tokens, its place among the N pairs) for every expert that was chosen at all."""
    token, start = chosen.t().nonzero(as_tuple=True)[1], 0
    for expert, count in enumerate(chosen.sum(0).tolist()):
        if count:
            rows = slice(start, start + count)
            yield expert, token[rows], rows
            start += count


def _add_product(target: Tensor, tokens: Tensor, left: Tensor, right: Tensor) -> None:
    """target[tokens] += left @ right, for distinct tokens."""
    target.index_copy_(0, tokens, target[tokens].addmm_(left, right))


def _of(weights: Tensor, expert: int) -> Tensor:
    """The matrix of an expert; a lora_A (1, I, R) is every expert's."""
    return weights[expert if len(weights) > 1 else 0]


class _Grouped(Products):
    name = "grouped"

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        o, gates, dtype = operands, operands.token_gates(), base_out.dtype
        A, B, factor = o.lora_A.to(dtype), o.lora_B.to(dtype), (gates * o.scaling).to(dtype)
        y, parts = base_out if inplace else base_out.clone(), []
        for i, tokens, _ in _rows(chosen_by(gates)):
            p = o.x[tokens] @ _of(A, i)
            _add_product(y, tokens, p * factor[tokens, i, None], B[i].t())
            parts.append(p)
        return y, o, torch.cat(parts) if parts else o.x.new_empty(0, A.shape[2])

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        o, s, gates, dtype = operands, operands.scaling, operands.token_gates(), p.dtype
        A, B = o.lora_A.to(dtype), o.lora_B.to(dtype)
        h = (o.gradient_factor() * s).to(dtype)
        exact = h if o.settings.scale_input_grad else (gates * s).to(dtype)
        dx = (dy.new_zeros(len(dy), A.shape[1]) if needs.onto is None else needs.onto) if needs.x else None
        dgates = torch.zeros_like(gates) if needs.gates else None
        dA, dB = torch.zeros_like(A) if needs.A else None, torch.zeros_like(B) if needs.B else None
        for i, tokens, rows in _rows(chosen_by(gates)):
            dy_i, p_i = dy[tokens], p[rows]
            q_i, h_i = dy_i @ B[i], h[tokens, i, None]
            if dgates is not None:
                dgates[tokens, i] = (q_i * p_i.to(gates.dtype)).sum(-1) * s
            if dx is not None:
                _add_product(dx, tokens, q_i * exact[tokens, i, None], _of(A, i).t())
            if dA is not None:
                _of(dA, i).addmm_(o.x[tokens].t(), q_i * h_i)
            if dB is not None:
                torch.mm(dy_i.t(), p_i * h_i, out=dB[i])
        dx, drouter = through_router(o, dgates, dx, needs, dtype)
        dA, dB = None if dA is None else dA.to(o.lora_A.dtype), None if dB is None else dB.to(o.lora_B.dtype)
        return Grads(dx, dgates, dA, dB, drouter)


GROUPED = _Grouped()
