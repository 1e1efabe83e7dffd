"""Mixtures whose experts are spread over a process group: moving tokens to experts, and what either way moves.

Shape suffixes: T this rank's tokens, I, O features, E experts of all ranks, L = E / ranks experts of this rank, R rank
of one expert; N rows (token, rank of an expert that it chose) that this rank sends, M those that it receives.

"weights" is in `gathering`. Sent by each rank, b bytes per element: 3 * (ranks - 1) / ranks * E R (I + O) * b

Communication phases of "tokens" (`exchanged_moe_lora`): all-to-alls with as many rows as there are; nothing is dropped.

    forward   row counts; x (I) and gates (L) of every row to the experts' rank; the mixture's output (O) back
    backward  dy (O) to the experts' rank; dx (I) and dgates (L) back
    sent by each rank and row: 2 (I + O) * b + 2 L * 4

Every rank of the group takes part in every phase, with no rows as well. dA and dB are sums over the group's tokens,
as DeepSpeed expects of expert parameters: it adds up over the expert-data-parallel group and divides by the world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..mixture.compute import ExpertCompute, Needs, no_autocast, refuse_second_derivative
from ..pairs import GateSettings


class _Exchange:
    """Rows between this rank and the experts' ranks: who sends how many rows to whom."""

    def __init__(self, chosen: Tensor, group: dist.ProcessGroup) -> None:
        self.group, ranks = group, dist.get_world_size(group)
        wanted = chosen.view(len(chosen), ranks, chosen.shape[1] // ranks).any(-1)
        self.rank, self.token = wanted.t().nonzero(as_tuple=True)
        counts = wanted.sum(0)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        self.sent, self.received = counts.tolist(), received.tolist()

    def there(self, rows_N: Tensor) -> Tensor:
        """(N, a) of this rank -> (M, a) for its experts."""
        return self._move(rows_N, self.sent, self.received)

    def back(self, rows_M: Tensor) -> Tensor:
        """(M, a) -> (N, a)."""
        return self._move(rows_M, self.received, self.sent)

    def _move(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.group)
        return result


def exchanged_moe_lora(
    base_out: Tensor,
    x: Tensor,
    gates: Tensor,
    chosen: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    settings: GateSettings | None,
    compute: ExpertCompute,
    group: dist.ProcessGroup,
) -> Tensor:
    """`mixture.moe_lora.moe_lora` over the experts of all ranks of `group`, by sending tokens to them ("tokens").

    Args:
        lora_A: (L, I, R). lora_B: (L, O, R): this rank's. All else as there; gates and chosen are (T, E).
    """
    settings = settings or GateSettings()
    return _Exchanged.apply(base_out, x, gates, chosen, lora_A, lora_B, scaling, settings, compute, group)


class _Exchanged(torch.autograd.Function):
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
        compute: ExpertCompute,
        group: dist.ProcessGroup,
    ) -> Tensor:
        with no_autocast(x):
            exchange, dtype = _Exchange(chosen, group), base_out.dtype
            shape = (len(x), dist.get_world_size(group), len(lora_A))  # not -1: there may be no tokens
            # One tensor for both: a gate of -1 says "not chosen" (a chosen expert's gate may have underflowed to 0).
            marked = gates.masked_fill(~chosen, -1.0).view(shape)[exchange.token, exchange.rank]
            x_M, marked_M = exchange.there(x.to(dtype)[exchange.token]), exchange.there(marked)
            chosen_M, gates_M = marked_M >= 0, marked_M.clamp(min=0)
            zeros = base_out.new_zeros(len(x_M), base_out.shape[1])
            y_M, p = compute.forward(zeros, x_M, gates_M, chosen_M, lora_A, lora_B, scaling, True)
            y = base_out.index_add(0, exchange.token, exchange.back(y_M))
        ctx.scaling, ctx.settings, ctx.compute, ctx.exchange = scaling, settings, compute, exchange
        ctx.x_dtype, ctx.shape = x.dtype, (*x.shape, *chosen.shape)
        saved_x = x_M if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(saved_x, p, gates_M, chosen_M, lora_A, lora_B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x_M, p, gates_M, chosen_M, lora_A, lora_B = ctx.saved_tensors
        needs_base, needs_x, needs_gates, _, needs_A, needs_B = ctx.needs_input_grad[:6]
        needs, exchange = Needs(needs_x, needs_gates, needs_A, needs_B), ctx.exchange
        (num_tokens, in_features, _, num_experts), dx, dgates = ctx.shape, None, None
        with no_autocast(dy):
            dy_M = exchange.there(dy[exchange.token])
            grads = ctx.compute.backward(
                dy_M, x_M, p, gates_M, chosen_M, lora_A, lora_B, ctx.scaling, ctx.settings, needs
            )
            if grads.dx is not None:
                dx = dy.new_zeros(num_tokens, in_features).index_add_(0, exchange.token, exchange.back(grads.dx))
                dx = dx.to(ctx.x_dtype)
            if grads.dgates is not None:
                dgates = gates_M.new_zeros(num_tokens, num_experts)
                local = gates_M.shape[1]
                by_rank = dgates.view(num_tokens, num_experts // local, local)
                by_rank[exchange.token, exchange.rank] = exchange.back(grads.dgates)
        return dy if needs_base else None, dx, dgates, None, grads.dA, grads.dB, None, None, None, None


def share_needing(num_experts: int, ranks: int, top_k: int) -> float:
    """Share of tokens that need a given rank, if routing is even: 1 - C(E - L, k) / C(E, k)."""
    local = num_experts // ranks
    missed = 1.0
    for i in range(top_k):
        missed *= max(num_experts - local - i, 0) / (num_experts - i)
    return 1 - missed


def bytes_moved(
    num_experts: int, ranks: int, top_k: int, in_features: int, out_features: int, rank: int, tokens: float, size: int
) -> dict[str, float]:
    """Bytes that a rank sends per layer and training step (forward and backward), for both ways.

    "tokens" takes routing to be even (`share_needing`).

    Args:
        tokens: per rank. size: bytes per element of the compute dtype.
    """
    local = num_experts // ranks
    rows = tokens * share_needing(num_experts, ranks, top_k) * (ranks - 1)
    width = in_features + out_features
    return {
        "weights": 3 * (ranks - 1) / ranks * num_experts * rank * width * size,
        "tokens": rows * (2 * width * size + 2 * local * 4),
    }
