"""The mixture layer as the papers write it: a loop over experts, gradients by autograd. Slow; what tests compare with.

Nothing here is shared with the fast path except `route`, and even that choice can be given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import chosen_by, route


def reference_layer(
    x: Tensor,
    base_out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router_weight: Tensor,
    top_k: int,
    scaling: float,
    gate_scaling: str = "none",
    scale_input_grad: bool = False,
    chosen: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """y = base + s * sum_{i in topk} g_i B_i A_i x, expert by expert, with the gate scaling by `detach`.

    With u_i = B_i A_i x, and h_i the factor that `gate_scaling` names, each expert's term is written so that its
    value is g_i u_i while A_i and B_i receive the factor h_i and g_i receives u_i:

        term_i = [h_i] u_i + (g_i - [h_i]) [u_i]                                          ([.] is detach)

    That is the published trick; x receives h_i too. To give x the exact factor g_i, u_i is split into one copy that
    only A and B see and one that only x sees:

        term_i = [h_i] u_i(A, B, [x]) + [g_i] (u_i([A], [B], x) - [u_i]) + (g_i - [h_i]) [u_i]

    Args:
        x: (T, I). base_out: (T, O). lora_A: (E, I, R), or (1, I, R): shared. lora_B: (E, O, R). router_weight: (E, I).
        top_k: k. scaling: s. gate_scaling, scale_input_grad: see `GateSettings`.
        chosen: (T, E) bool: this choice of experts, for comparisons across dtypes; None: the k largest logits.
        temperature: what the logits are divided by.

    Returns:
        (T, O).

    Source: Sun et al., arXiv 2502.15828, section 3.3, per expert.
    """
    logits = x @ router_weight.t() / temperature
    if chosen is None:
        chosen = chosen_by(route(logits, top_k))
    gates = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    y = base_out
    for i in range(lora_B.shape[0]):
        A, B, g = lora_A[i if len(lora_A) > 1 else 0], lora_B[i], gates[:, i : i + 1]
        if gate_scaling == "none":
            h = g
        elif gate_scaling == "sqrt":
            h = g.sqrt()
        else:
            h = chosen[:, i : i + 1].to(g.dtype)
        h = h.detach()
        u = (x @ A @ B.t()).detach()
        if scale_input_grad:
            term = h * (x @ A @ B.t())
        else:
            term = h * (x.detach() @ A @ B.t()) + g.detach() * (x @ A.detach() @ B.detach().t() - u)
        y = y + scaling * (term + (g - h) * u)
    return y


def max_relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, in float64; 0 for two empty or two all-zero tensors.

    Args:
        actual, expected: equal shapes, any floating dtypes.
    """
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    return (
        difference / max(expected.double().abs().max().item(), torch.finfo(torch.float64).tiny) if difference else 0.0
    )
