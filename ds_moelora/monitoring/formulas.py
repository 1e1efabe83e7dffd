"""What monitoring reports of a mixture, as formulas on tensors: loads, entropy, similarity of experts, conditioning.

Shape suffixes: L layers, S sequences, N tokens per sequence, E experts, P dimensions of a sketch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..mixture.routing import sequence_balance_loss

SKETCH_DIM = 16


@torch.no_grad()
def router_sums(logits_SNE: Tensor, chosen_SNE: Tensor, real_SN: Tensor | None = None) -> Tensor:
    """Sums over a router's real tokens, or sequences, which add up over micro-batches and processes.

    Args:
        logits_SNE: (S, N, E). chosen_SNE: (S, N, E) bool.
        real_SN: (S, N), non-zero where a token is real; None: all are.

    Returns:
        (4 + E,) float32: entropies H(p) / log E of the tokens, p the softmax over all E experts (0 for E = 1);
        `mixture.routing.sequence_balance_loss` of the sequences; tokens; sequences with a real token; and the slots
        (token, chosen expert) of each expert.
    """
    S, N, E = logits_SNE.shape
    logits = logits_SNE.float()
    real = torch.ones(S, N, device=logits.device) if real_SN is None else real_SN.ne(0).float()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1) / (math.log(E) if E > 1 else 1.0)
    balance = sequence_balance_loss(logits, chosen_SNE, None if real_SN is None else real)
    sums = torch.stack([(entropy * real).sum(), balance.sum(), real.sum(), real.any(1).float().sum()])
    return torch.cat([sums, (chosen_SNE * real[..., None]).sum((0, 1))])


def load_over_ideal(slots_LE: Tensor, num_experts: Tensor) -> Tensor:
    """c_i / (sum_j c_j / E): 1 is an even share, E / k the most there can be; NaN where a layer saw no token.

    Args:
        slots_LE: (L, E) slots of each expert; columns from a layer's own number of experts on are ignored.
        num_experts: (L,) E of each layer.

    Returns:
        (L, E), NaN in the ignored columns.
    """
    there = torch.arange(slots_LE.shape[1], device=slots_LE.device) < num_experts[:, None]
    slots = slots_LE.where(there, 0)
    return (slots * num_experts[:, None] / slots.sum(1, keepdim=True)).where(there, torch.nan)


def projection(features: int, device: torch.device | None = None) -> Tensor:
    """(features, P) with E[Q Q^T] = I: the same on every rank; the identity if features <= P = `SKETCH_DIM`."""
    if features <= SKETCH_DIM:
        return torch.eye(features, SKETCH_DIM, device=device)
    drawn = torch.randn(features, SKETCH_DIM, generator=torch.Generator().manual_seed(features))
    return (drawn / SKETCH_DIM**0.5).to(device)


@torch.no_grad()
def sketch_products(lora_A: Tensor, lora_B: Tensor, of_in: Tensor, of_out: Tensor) -> Tensor:
    """Q_out^T B_i A_i Q_in: inner products of these P x P matrices estimate those of the products B_i A_i.

    The estimate is unbiased, with a standard deviation of about 1 / P of the norms where experts have nothing in
    common, and exact for experts that are multiples of each other, or have at most P features.

    Args:
        lora_A: (E, in, r), or (1, in, r) for all experts. lora_B: (E, out, r).
        of_in: (in, P). of_out: (out, P): `projection`.

    Returns:
        (E, P * P) float32.

    Source: Johnson and Lindenstrauss' lemma, on both sides of a matrix.
    """
    left = lora_B.float().mT @ of_out  # (E, r, P)
    right = lora_A.float().mT @ of_in
    return (left.mT @ right).flatten(1)


def mean_similarity(sketches_LEV: Tensor) -> Tensor:
    """The mean over layers and pairs i < j of cos(v_i, v_j); pairs with a zero vector are left out (0-dim; NaN: none).

    1: all experts of a layer are multiples of each other; 0: orthogonal.

    Args:
        sketches_LEV: (L, E, V).
    """
    norms = sketches_LEV.norm(dim=-1, keepdim=True)
    unit = sketches_LEV / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    there = norms.gt(0).to(unit.dtype)
    # sum over i != j of <u_i, u_j> = |sum_i u_i|^2 - sum_i |u_i|^2, per layer; likewise the number of pairs.
    cosines = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    pairs = there.sum((1, 2)).square() - there.sum((1, 2))
    return cosines.sum() / pairs.sum()
