"""The mixture's products over the chosen experts alone: T*k rows instead of T*E.

Shape suffixes as in `core.moe_lora`, and N: the pairs (token, chosen expert), sorted by expert: T*k of them, fewer with
top-p routing. With e, t the expert and the token of pair n:

    p_n = A_e^T x_t      y_t += s g_te B_e p_n      q_n = B_e^T dy_t
    dA_e = s sum_n h_te x_t q_n^T      dB_e = s sum_n h_te dy_t p_n^T
    dg_te = s <q_n, p_n>      dx_t += s g_te A_e q_n

A `lora_A` that all experts share, (1, I, R), is one matrix for all N rows.

FLOPs fall by E/k against the dense form; copies of N rows of x, y and dy are the price, and a loop of small products,
one per expert. The rows per expert are read on the host: one synchronisation per pass on a GPU. The sum over a token's
experts is an `index_add_`, whose order is not fixed on GPUs: results there are equal up to rounding, not to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .moe_lora import ExpertCompute, MixtureGrads, Needs, RouterStep, gate_factor
from .pairs import GateSettings


class _Pairs(NamedTuple):
    expert: Tensor  # (N,)
    token: Tensor  # (N,)
    counts: list[int]  # per expert

    def of(self, values_TE: Tensor) -> Tensor:
        """(T, E) -> (N, 1)."""
        return values_TE[self.token, self.expert].unsqueeze(-1)

    def counts_of(self, weights: Tensor) -> list[int]:
        """Rows for each matrix: those of each expert, or all, for a lora_A (1, I, R) that the experts share."""
        return self.counts if len(weights) == len(self.counts) else [len(self.token)]


def _pairs(chosen: Tensor) -> _Pairs:
    expert, token = chosen.t().nonzero(as_tuple=True)
    return _Pairs(expert, token, chosen.sum(0).tolist())


def _per_expert(rows_N: Tensor, weights_E: Tensor, counts: list[int]) -> Tensor:
    """(N, a), (E, a, b) -> (N, b): every expert's rows times its own matrix."""
    parts = [rows @ w for rows, w in zip(rows_N.split(counts), weights_E, strict=True) if len(rows)]
    return torch.cat(parts) if parts else rows_N.new_zeros(0, weights_E.shape[2])


def _outer(left_N: Tensor, right_N: Tensor, counts: list[int]) -> Tensor:
    """(N, a), (N, b) -> (E, a, b): sum over every expert's rows of left^T right; zero without rows."""
    products = [a.t() @ b for a, b in zip(left_N.split(counts), right_N.split(counts), strict=True)]
    return torch.stack(products)


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
    dtype, pairs = base_out.dtype, _pairs(chosen)
    p = _per_expert(x[pairs.token], lora_A.to(dtype), pairs.counts_of(lora_A))
    weighted = p * (pairs.of(gates) * scaling).to(dtype)
    y_N = _per_expert(weighted, lora_B.to(dtype).transpose(1, 2), pairs.counts)
    y = base_out if inplace else base_out.clone()
    return y.index_add_(0, pairs.token, y_N), p


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
    s, dtype, pairs = scaling, p.dtype, _pairs(chosen)
    dx = dgates = dA = dB = drouter = None
    h_TE = gate_factor(settings.gate_scaling, gates, chosen) * s
    h = pairs.of(h_TE).to(dtype)
    dy_N = dy[pairs.token]
    if needs.x or needs.gates or needs.A:
        q = _per_expert(dy_N, lora_B.to(dtype), pairs.counts)
    if needs.gates:
        dgates = torch.zeros_like(gates)
        dgates[pairs.token, pairs.expert] = (q * p.to(gates.dtype)).sum(-1) * s
    if needs.x:
        factor = h if settings.scale_input_grad else pairs.of(gates * s).to(dtype)
        dx_N = _per_expert(q * factor, lora_A.to(dtype).transpose(1, 2), pairs.counts_of(lora_A))
        dx = dy.new_zeros(len(dy), lora_A.shape[1]) if onto is None else onto
        dx.index_add_(0, pairs.token, dx_N)
    if needs.A:
        assert x is not None
        dA = _outer(x[pairs.token], q * h, pairs.counts_of(lora_A))
    if needs.B:
        dB = _outer(dy_N, p * h, pairs.counts)
    if router is not None and dgates is not None:
        dlogits = router.backward(dgates).to(dtype)
        dx = None if dx is None else dx.addmm_(dlogits, router.weight.to(dtype))
        drouter = None if x is None else dlogits.t() @ x
    return MixtureGrads(dx, dgates, dA, dB, drouter)


GROUPED = ExpertCompute("grouped", _forward, _backward)


# Dense costs E*r columns whether chosen or not; grouped copies and multiplies k rows per token, a cost that hardly
# depends on r. One CPU core, 768 -> 768, 1,024 tokens: they cross at E*r of about 128 k (docs/expert_parallelism.md).
GROUPED_FROM_COLUMNS = 256
GROUPED_FROM_COLUMNS_PER_CHOICE = 128


def choose_compute(wish: str, num_experts: int, top_k: int, rank: int) -> str:
    """The wish, or for "auto": "grouped" on CPUs if E*r >= max(256, 128 k), else "dense".

    With an accelerator "auto" is dense: grouped has to know on the host how many rows each expert gets, one
    synchronisation per pass, and where it would still win there has not been measured.

    Args:
        wish: "dense", "grouped" or "auto". num_experts: of those that one product would cover.
    """
    if wish != "auto":
        return wish
    if torch.accelerator.is_available():
        return "dense"
    bound = max(GROUPED_FROM_COLUMNS, GROUPED_FROM_COLUMNS_PER_CHOICE * top_k)
    return "grouped" if num_experts * rank >= bound else "dense"
