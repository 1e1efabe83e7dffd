"""Experts from the singular value decomposition of the weight that they adapt (Fan et al., GOAT, arXiv 2502.16894).

W0 = U S V^T has n = min(in, out) singular triplets, S descending. Every expert takes r of them and starts at

    A_i = sqrt(S_i / (s rho)) V_i^T        B_i = U_i sqrt(S_i / (s rho))        s B_i A_i = U_i S_i V_i^T / rho

so that the experts start inside the weight's own directions. Their mean is subtracted from the base weight,

    W = W0 - (s / E) sum_i B_i A_i         W + s sum_i g_i B_i A_i = W0         for g_i = 1 / E,

which is the expectation over the tokens of a router that treats all experts alike: the gates of a token sum to 1, so
their mean over tokens is 1/E, whatever k is. That holds for any triplets, hence for every variant.

Which triplets (t = floor(n / E), the length of a segment; the n - E t smallest belong to no segment):

    goat        the first r of each segment [i t, (i + 1) t)         goat_mini   the last r of each
    pissa       expert i: [i r, (i + 1) r), the top of the spectrum  milora      expert i: the i-th r of the last E r

In every case r <= t is what fits. Shapes: A (E, in, r), B (E, out, r), as the adapter stores them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .svd import Triplets

VARIANTS = ("goat", "goat_mini", "pissa", "milora")


def goat_scaling(in_features: int, rank: int, eta: float = 1.0) -> float:
    """s = sqrt(3 eta in / r), at which a LoRA step follows that of full fine-tuning (arXiv 2502.16894, theorem 3.5).

    Args:
        eta: learning rate of full fine-tuning over that of LoRA.
    """
    return math.sqrt(3 * eta * in_features / rank)


def check_rank(in_features: int, out_features: int, num_experts: int, rank: int, layer: str) -> None:
    """Checks that every expert gets r singular triplets of its own.

    Raises:
        ValueError: naming the largest rank that fits, or the largest number of experts.
    """
    n = min(in_features, out_features)
    if rank * num_experts > n // num_experts * num_experts:
        largest = n // num_experts
        remedy = (
            f"Use r <= {largest}, or fewer experts."
            if largest
            else f"Use at most {n} experts, or leave this layer out (exclude_modules)."
        )
        raise ValueError(
            f"{layer}: r={rank} with num_experts={num_experts} does not fit a weight of {out_features} x "
            f"{in_features}, whose {n} singular values make segments of {largest}. {remedy}"
        )


def triplet_indices(n: int, num_experts: int, rank: int, variant: str) -> Tensor:
    """Numbers of the singular triplets, 0 being the largest, that the experts take.

    Args:
        n: min(in, out). variant: one of `VARIANTS`.

    Returns:
        (E, r) int64.

    Raises:
        ValueError: an unknown variant.
    """
    within = torch.arange(rank)
    expert = torch.arange(num_experts)[:, None]
    segment = n // num_experts
    if variant == "goat":
        return expert * segment + within
    if variant == "goat_mini":
        return (expert + 1) * segment - rank + within
    if variant == "pissa":
        return expert * rank + within
    if variant == "milora":
        return n - num_experts * rank + expert * rank + within
    raise ValueError(f"init_lora_weights={variant!r} is unknown; use one of {', '.join(VARIANTS)}.")


def starting_factors(triplets: Triplets, num_experts: int, scaling: float, rho: float) -> tuple[Tensor, Tensor]:
    """A_i = sqrt(S_i / (s rho)) V_i^T and B_i = U_i sqrt(S_i / (s rho)).

    Args:
        triplets: those of `triplet_indices(...).flatten()`.
        scaling: s. rho: > 0.

    Returns:
        A (E, in, r), B (E, out, r) in the dtype of the triplets.
    """
    size = (triplets.S / (scaling * rho)).sqrt()
    A, B = ((side * size).unflatten(1, (num_experts, -1)).permute(1, 0, 2) for side in (triplets.V, triplets.U))
    return A.contiguous(), B.contiguous()


def mean_product(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """(s / E) sum_i B_i A_i, which is subtracted from the base weight; computed in the dtype, or float32 if wider.

    Args:
        lora_A: (E, in, r). lora_B: (E, out, r).

    Returns:
        (out, in).
    """
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    A, B = (factor.to(wide).permute(1, 0, 2).flatten(1) for factor in (lora_A, lora_B))
    return (scaling / len(lora_A)) * (B @ A.T)
