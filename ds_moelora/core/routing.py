"""Which experts a token goes to, with which weights, and how evenly the experts are used.

Shape suffixes: T tokens, S sequences, N tokens per sequence, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """A router's decision for T tokens and E experts.

    Args:
        gates: (T, E), float32 or wider; rows sum to 1, zero where an expert is not chosen.
        chosen: (T, E) bool; exactly k True per row. Kept beside the gates because the gate of a chosen expert may
            underflow to 0.
    """

    gates: Tensor
    chosen: Tensor


def route(logits_TE: Tensor, top_k: int) -> Routing:
    """g = softmax over the k largest logits of each token (equal to the renormalised top-k of the full softmax).

    Args:
        logits_TE: (T, E) router logits, any floating dtype; T may be 0.
        top_k: k, with 1 <= k <= E.

    Returns:
        `Routing` with differentiable gates, computed in float32 (float64 for float64 logits).

    Source: Shazeer et al., "Outrageously Large Neural Networks", section 2.1, without the noise.
    """
    wide_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if top_k == logits_TE.shape[-1]:
        return Routing(wide_TE.softmax(-1), torch.ones_like(wide_TE, dtype=torch.bool))
    top_logits, top_index = wide_TE.topk(top_k, dim=-1)
    gates = torch.zeros_like(wide_TE).scatter(-1, top_index, top_logits.softmax(-1))
    chosen = torch.zeros_like(wide_TE, dtype=torch.bool).scatter(-1, top_index, True)
    return Routing(gates, chosen)


def sequence_balance_loss(logits_SNE: Tensor, chosen_SNE: Tensor, real_SN: Tensor | None = None) -> Tensor:
    """The Switch load-balancing loss of each sequence: L_s = E * sum_i f_i P_i.

    f_i is the share of the sequence's top-k slots that went to expert i, `count_i / (k * tokens)`; it is a constant to
    autograd. P_i is the mean over the sequence's tokens of the full softmax probability of expert i. Perfectly even
    use gives 1 for any k, everything on one expert gives up to E / k.

    The loss is a product of two means, so over a whole batch it would not be the mean of its values over the
    micro-batches. Per sequence it is: a sequence is never split, and only the (linear) mean over sequences remains.

    Args:
        logits_SNE: (S, N, E) router logits.
        chosen_SNE: (S, N, E) bool, the top-k choice.
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
        weight = real_SN.ne(0).to(wide)
        weight = (weight / weight.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        mean_probability, slots_per_token = (probabilities * weight).sum(1), (slots * weight).sum(1)
    # A token fills k slots, so the shares sum to k; dividing by that sum needs no k and leaves an empty sequence at 0.
    share = slots_per_token / slots_per_token.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    return logits_SNE.shape[-1] * (share * mean_probability).sum(-1)
