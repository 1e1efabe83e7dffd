"""Which experts a token goes to, with which weights, and how evenly the experts are used.

Shape suffixes: T tokens, S sequences, N tokens per sequence, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chosen_by(gates_TE: Tensor) -> Tensor:
    """(T, E) bool: which experts are chosen, from the gates of `route`; k True per row, with top-p routing 1 to k."""
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[gates_TE.dtype]
    return gates_TE.view(bits) != torch.iinfo(bits).min  # the bits of -0.0


def route(logits_TE: Tensor, top_k: int, top_p: float | None = None) -> Tensor:
    """g = softmax over the logits of each token's chosen experts (equal to the renormalised full softmax).

    Chosen are the k experts with the largest probabilities, in the full softmax; with `top_p` of these k only the
    fewest, from the largest down, whose probabilities add up to at least p (all k if they do not): at least one.

    Args:
        logits_TE: (T, E) router logits, any floating dtype; T may be 0.
        top_k: k, with 1 <= k <= E.
        top_p: p in (0, 1); None: always k experts.

    Returns:
        (T, E) differentiable gates in float32 (float64 for float64 logits); rows sum to 1. Where an expert is not
        chosen they are -0.0; the gate of a chosen expert may underflow, to +0.0 (see `chosen_by`).

    Source: Shazeer et al., "Outrageously Large Neural Networks", section 2.1, without the noise; top_p: Huang et al.,
    "Harder Tasks Need More Experts" (arXiv 2403.07652), here with an upper bound k and renormalised gates.
    """
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if top_p is not None:
        chosen = _nucleus(wide_TE.detach().softmax(-1), top_k, top_p)
        return wide_TE.masked_fill(~chosen, -torch.inf).softmax(-1).masked_fill(~chosen, -0.0)
    if top_k == logits_TE.shape[-1]:
        return wide_TE.softmax(-1)
    if not (torch.is_grad_enabled() and wide_TE.requires_grad):
        return _top_k_gates(wide_TE, top_k)
    return _TopKGates.apply(wide_TE, top_k)


def _top_k_gates(logits_TE: Tensor, top_k: int) -> Tensor:
    top_logits, top_index = logits_TE.topk(top_k, dim=-1, sorted=False)
    return torch.full_like(logits_TE, -0.0).scatter_(-1, top_index, top_logits.softmax(-1))


class _TopKGates(torch.autograd.Function):
    """Saved for backward: the gates alone, which the mixture saves anyway."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int) -> Tensor:
        gates = _top_k_gates(logits_TE, top_k)
        ctx.save_for_backward(gates)
        return gates

    @staticmethod
    def backward(ctx: Any, dgates: Tensor) -> tuple[Tensor, None]:
        (gates,) = ctx.saved_tensors
        return gates_backward(gates, dgates), None


def gates_backward(gates_TE: Tensor, dgates_TE: Tensor) -> Tensor:
    """The gradient of the logits, dz_i = g_i (dg_i - sum_j g_j dg_j), from that of the gates; both (T, E)."""
    # Softmax's own: one launch. Where the gates are 0, so is the result.
    return torch.ops.aten._softmax_backward_data(dgates_TE, gates_TE, -1, gates_TE.dtype)


def _nucleus(probabilities_TE: Tensor, top_k: int, top_p: float) -> Tensor:
    """(T, E) bool: of the k most probable experts those before which less than p has been added up."""
    largest, index = probabilities_TE.topk(top_k, dim=-1)
    mass_before = largest.cumsum(-1) - largest
    kept = mass_before < top_p
    kept[..., 0] = True  # even if it is NaN: a broken token must not pass in silence, without any expert
    return torch.zeros_like(probabilities_TE, dtype=torch.bool).scatter(-1, index, kept)


def sequence_balance_loss(logits_SNE: Tensor, chosen_SNE: Tensor, real_SN: Tensor | None = None) -> Tensor:
    """The Switch load-balancing loss of each sequence: L_s = E * sum_i f_i P_i.

    f_i is the share of the sequence's slots (token, chosen expert) that went to expert i, `count_i / (k * tokens)` with
    top-k routing; it is a constant to autograd. P_i is the mean over the sequence's tokens of the full softmax
    probability of expert i. Perfectly even use gives 1 for any k, everything on one expert gives up to E / k.

    The loss is a product of two means, so over a whole batch it would not be the mean of its values over the
    micro-batches. Per sequence it is: a sequence is never split, and only the (linear) mean over sequences remains.

    Args:
        logits_SNE: (S, N, E) router logits.
        chosen_SNE: (S, N, E) bool, the choice.
        real_SN: (S, N), non-zero where a token is real; None: all are. A sequence without real tokens has loss 0.

    Returns:
        (S,) losses, float32 or wider.

    Source: Fedus et al., "Switch Transformers", equation 4; per sequence as in DeepSeek-V3 (arXiv 2412.19437),
    equation 17.
    """
    wide = torch.promote_types(logits_SNE.dtype, torch.float32)
    probabilities = logits_SNE.to(wide).softmax(-1)
    slots = chosen_SNE.to(wide)
    if real_SN is None:
        num_tokens = max(logits_SNE.shape[1], 1)
        mean_probability, slots_per_token = probabilities.sum(1) / num_tokens, slots.sum(1) / num_tokens
    else:
        weight = _token_weights(real_SN, wide).unsqueeze(-1)
        mean_probability, slots_per_token = (probabilities * weight).sum(1), (slots * weight).sum(1)
    # Dividing by the slots of all experts needs no k, fits any number per token, and leaves an empty sequence at 0.
    share = slots_per_token / slots_per_token.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return logits_SNE.shape[-1] * (share * mean_probability).sum(-1)


def sequence_z_loss(logits_SNE: Tensor, real_SN: Tensor | None = None) -> Tensor:
    """The router z-loss of each sequence: the mean over its tokens of (log sum_i exp z_i)^2, z the token's logits.

    It keeps logits small, where a softmax in low precision still tells them apart. The paper takes the mean over all
    tokens of a batch; per sequence, like `sequence_balance_loss`, any split of a batch into sequences has one meaning.

    Args:
        logits_SNE: (S, N, E) router logits.
        real_SN: (S, N), non-zero where a token is real; None: all are. A sequence without real tokens has loss 0.

    Returns:
        (S,) losses, float32 or wider.

    Source: Zoph et al., "ST-MoE" (arXiv 2202.08906), equation 5.
    """
    wide = torch.promote_types(logits_SNE.dtype, torch.float32)
    squares = logits_SNE.to(wide).logsumexp(-1).square()
    if real_SN is None:
        return squares.sum(1) / max(logits_SNE.shape[1], 1)
    return (squares * _token_weights(real_SN, wide)).sum(1)


def _token_weights(real_SN: Tensor, dtype: torch.dtype) -> Tensor:
    """(S, N): 1 / (real tokens of the sequence) where a token is real, else 0."""
    weight = real_SN.ne(0).to(dtype)
    return weight / weight.sum(1, keepdim=True).clamp(min=1)
