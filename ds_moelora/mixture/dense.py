"""The mixture's products over all experts at once: a plain LoRA of rank E*R, scaled by the gates in between.

Side by side the experts are one (I, E*R) and one (E*R, O) matrix, and p = x A is the projection that the gates scale.
Tensors of rank level are (E*R, T), tokens last: the gates then multiply long rows rather than R neighbours, and dA and
dB are products of two row-major matrices. Shape suffixes: `mixture.operands`; formulas: `mixture.mixture`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Grads, Needs, Operands, Products

PRODUCTS_AT_ONCE = 1 << 18  # elements; 1 MB in float32
ONE_TOKEN_RANK = 16  # the largest rank at which R times the multiplications are cheaper than stacked copies
FEW_COLUMNS = 4


def stack(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, F, R) -> (E*R, F): one small copy per use, which the cast to the compute dtype makes anyway."""
    return factors.to(dtype).transpose(1, 2).reshape(-1, factors.shape[1])


def unstack(stacked: Tensor, like: Tensor) -> Tensor:
    """(E*R, F) -> (E, F, R), a copy in the dtype of `like`."""
    rows = expert_rows(stacked, like.shape[2])
    return rows.transpose(1, 2).to(like.dtype, memory_format=torch.contiguous_format, copy=True)


def expert_rows(stacked: Tensor, rank: int) -> Tensor:
    """(E*R, T) -> (E, R, T), a view."""
    return stacked.view(len(stacked) // rank, rank, stacked.shape[1])  # not -1: there may be no tokens


def _by_expert(values_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, E) -> (E, 1, T), contiguous: what every rank component of an expert is multiplied by."""
    return values_TE.t().to(dtype, memory_format=torch.contiguous_format).unsqueeze(1)


def _scale(projection: Tensor, factor: Tensor, rank: int) -> Tensor:
    """Multiplies expert e's R rows of (E*R, T) by row e of (E, 1, T); of a shared (R, T), every expert has them all."""
    return (expert_rows(projection, rank) * factor).flatten(0, 1)


def _inner_products(q_ERT: Tensor, p_ERT: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, T) sums over R of q p in `dtype`, float32 or wider: they are the router's whole signal, and differences of
    nearly equal terms. p may be (1, R, T), of a shared A.

    On CPUs a few experts at a time, whose wide products stay in the cache; whole, they are the peak of a step.
    """
    E, R, T = q_ERT.shape
    if q_ERT.device.type != "cpu" or E * R * T <= PRODUCTS_AT_ONCE:
        return (q_ERT * p_ERT.to(dtype)).sum(1)
    q_parts = q_ERT.split(max(PRODUCTS_AT_ONCE // (R * T), 1))
    p_parts = [p_ERT] * len(q_parts) if len(p_ERT) == 1 else p_ERT.split(len(q_parts[0]))
    return torch.cat([(q * p.to(dtype)).sum(1) for q, p in zip(q_parts, p_parts, strict=True)])


def _token_rows(rows: Tensor) -> Tensor:
    """(N, T) -> (T, N), copied: a product with a transposed view takes up to three times as long in bfloat16."""
    return rows.t().contiguous()


def _one_token(o: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """y and p without stacked copies, which would be most of the time that decoding adds.

    Factors as they lie are (E, I*R) matrices, and x times the identity an (I*R, R) one: R times the multiplications,
    on contiguous memory. In 16 bits matrices of few columns take longer than their copies in float32.
    """
    rank, dtype = o.lora_B.shape[2], base_out.dtype
    wide = torch.promote_types(dtype, torch.float32) if rank <= FEW_COLUMNS else dtype
    A, B = o.lora_A.to(wide).flatten(1), o.lora_B.to(wide).flatten(1)
    p = A @ o.x.to(wide).t().expand(-1, rank).diag_embed().view(-1, rank)
    weighted = p.t() * o.token_gates().to(wide)
    added = (weighted @ B).view(rank, -1, rank).diagonal(dim1=0, dim2=2).sum(-1).to(dtype)
    y = base_out.add_(added, alpha=o.scaling) if inplace else base_out.add(added, alpha=o.scaling)
    return y, p.view(-1, 1).to(dtype)


def _send_down(rows: Tensor, lora_A: Tensor, router: Tensor | None, onto: Tensor | None) -> Tensor:
    """(T, I): what `rows` (T, num_A*R + E) send through A, and through the router's weight, into x."""
    if router is None:
        weights = stack(lora_A, rows.dtype)
    else:
        num_A, features, rank = lora_A.shape
        weights = rows.new_empty(rows.shape[1], features)
        expert_rows(weights[: num_A * rank], rank).copy_(lora_A.transpose(1, 2))
        weights[num_A * rank :] = router
    return rows @ weights if onto is None else onto.addmm_(rows, weights)


def _factor_gradients(rows: Tensor, x: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor | None]:
    """dA, and the gradient (E, I) of the router's weight if `rows` (num_A*R + E, T) have any below those of A."""
    gradients, of_A = rows @ x, lora_A.shape[0] * lora_A.shape[2]
    # A view of the router's would keep all of them.
    return unstack(gradients[:of_A], lora_A), gradients[of_A:].clone() if len(gradients) > of_A else None


class _Joint:
    """q = B dy and, below it, room for the gradient of the logits: rows that join the products with x and A.

    Args:
        stacked_B: (E*R, O). dy: (T, O). num_A: E, or 1 for a shared A. rank: R. num_below: E, or 0 without a router.
    """

    def __init__(self, stacked_B: Tensor, dy: Tensor, num_A: int, rank: int, num_below: int) -> None:
        self._rows = dy.new_empty(len(stacked_B) + num_below, len(dy))
        upper, self.below = self._rows.split([len(stacked_B), num_below])
        torch.mm(stacked_B, dy.t(), out=upper)
        self.q, self._num_A = expert_rows(upper, rank), num_A

    def scaled(self, factor: Tensor, last: bool) -> Tensor:
        """(num_A*R + num_below, T): q times factor (E, 1, T), summed over experts if A is shared, and what is below.

        Args:
            last: nobody needs q any more, whose memory then takes the result.
        """
        if len(self.q) != self._num_A:
            return torch.cat([(self.q * factor).sum(0), self.below])
        rows = self._rows if last else self._rows.clone()
        expert_rows(rows[: self.q.shape[0] * self.q.shape[1]], self.q.shape[1]).mul_(factor)
        return rows


class _Dense(Products):
    name = "dense"

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        o, dtype = operands, base_out.dtype
        if len(o.x) == 1 and o.lora_B.shape[2] <= ONE_TOKEN_RANK:
            y, p = _one_token(o, base_out, inplace)
            return y, o, p
        p = stack(o.lora_A, dtype) @ o.x.t()
        weighted = _token_rows(_scale(p, _by_expert(o.token_gates() * o.scaling, dtype), o.lora_B.shape[2]))
        B = stack(o.lora_B, dtype)
        return base_out.addmm_(weighted, B) if inplace else torch.addmm(base_out, weighted, B), o, p

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        o, gates, dtype = operands, operands.token_gates(), p.dtype
        num_A, _, R = o.lora_A.shape
        h = _by_expert(o.gradient_factor() * o.scaling, dtype)
        dx = dgates = dA = dB = drouter = None
        if needs.B:
            dB = unstack(_scale(p, h, R) @ dy, o.lora_B)
        if not (needs.x or needs.gates or needs.A):
            return Grads(None, None, None, dB)
        router = o.router if needs.gates else None
        # The logits are E more projections of x: their gradient and the router's weight join the experts' products.
        joint = _Joint(stack(o.lora_B, dtype), dy, num_A, R, 0 if router is None else len(router))
        if needs.gates:
            dgates = _inner_products(joint.q, expert_rows(p, R), gates.dtype).mul_(o.scaling).t()
            if router is not None:
                joint.below.copy_(o.logits_gradient(dgates, needs.dlogits).t())
        same = o.scales_alike()
        if needs.x:
            exact = joint.scaled(h if same else _by_expert(gates * o.scaling, dtype), last=same or not needs.A)
            dx = _send_down(_token_rows(exact), o.lora_A, router, needs.onto)
        if needs.A:
            rows = exact if same and needs.x else joint.scaled(h, last=True)
            dA, drouter = _factor_gradients(rows, o.x, o.lora_A)
        return Grads(dx, dgates, dA, dB, drouter)


DENSE = _Dense()
