"""Numbers that tell what a saved adapter has learnt, from its files alone: norms, conditions, routers, likeness.

An expert's product is P_i = s B_i A_i^T with A (I, r), B (O, r), I x O entries that are never formed: norms and inner
products come from r x r Gram matrices, <P_i, P_j> = s^2 sum((A_i^T A_j) * (B_i^T B_j)), all in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_file import SavedLayer

DUPLICATE = 0.99  # cosine between two experts' products from which they are called duplicates
SAMPLED_TOKENS = 8192


@dataclass(frozen=True)
class ExpertFacts:
    """One expert.

    Args:
        norm_A, norm_B: Frobenius norms of the factors. norm: that of s B A, what the expert can add.
        moved: norm of s (B A - B0 A0), how far it is from its start; None without a start from singular values.
        condition_A, condition_B: largest over smallest eigenvalue of A^T A and B^T B, which the optimizer inverts; inf
            for a singular one (B before the first step).
        share: of the slots that this expert gets from inputs without any preference (`router_shares`), times E / k: 1
            for a router without preference.
    """

    norm_A: float
    norm_B: float
    norm: float
    moved: float | None
    condition_A: float
    condition_B: float
    share: float


@dataclass(frozen=True)
class LayerFacts:
    """One layer: its sizes, its experts, and what they have in common.

    Args:
        router_norm: mean norm of the router's rows. router_bias: the largest `share` of an expert, E / k at most.
        similarity: the largest cosine between two experts' products; 0 with one expert, or where both are zero.
        duplicates: pairs of experts whose cosine is at least `DUPLICATE`.
        shared_norm: norm of s B A of the shared expert; None without one.
        finite: all weights are.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    num_experts: int
    top_k: int
    scaling: float
    dtype: str
    parameters: int
    experts: list[ExpertFacts]
    router_norm: float
    router_bias: float
    similarity: float
    duplicates: list[tuple[int, int]]
    shared_norm: float | None
    finite: bool


def layer_facts(layer: SavedLayer) -> LayerFacts:
    """Everything about one layer."""
    A, B, router = layer.lora_A.double(), layer.lora_B.double(), layer.router.double()
    E = layer.config.num_experts
    shared = () if layer.shared is None else layer.shared
    trained = (layer.lora_A, layer.lora_B, layer.router, *shared)
    finite = all(bool(t.isfinite().all()) for t in trained)
    inner = _inner_products(A, B, A, B) if finite else torch.full((E, E), torch.nan, dtype=torch.float64)
    norms = inner.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms[None, :]
    cosine = torch.where(scale > 0, inner / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0).fill_diagonal_(0.0)
    pairs = (cosine.triu(1) >= DUPLICATE).nonzero().tolist()
    shares = router_shares(router, layer.config.top_k) if finite else torch.full((E,), torch.nan)
    return LayerFacts(
        name=layer.name,
        in_features=A.shape[1],
        out_features=B.shape[1],
        rank=A.shape[2],
        num_experts=E,
        top_k=layer.config.top_k,
        scaling=layer.scaling,
        dtype=str(layer.lora_A.dtype).removeprefix("torch."),
        parameters=sum(t.numel() for t in trained),
        experts=_expert_facts(layer, A, B, norms, shares, finite),
        router_norm=router.norm(dim=1).mean().item(),
        router_bias=shares.max().item(),
        similarity=cosine.max().item() if E > 1 else 0.0,
        duplicates=[(i, j) for i, j in pairs],
        shared_norm=_shared_norm(layer),
        finite=finite,
    )


def router_shares(router: Tensor, top_k: int) -> Tensor:
    """(E,) shares of slots, times E / k, of inputs that are standard normal: they favour no direction.

    The logits are then normal with covariance W W^T, and only that E x E matrix is needed. Real inputs have a mean and
    directions of their own: this shows what the router's weights alone prefer, and not the load in training.

    Args:
        router: W, (E, I). top_k: k.
    """
    values, vectors = torch.linalg.eigh(router @ router.T)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLED_TOKENS, len(router), generator=generator, dtype=router.dtype)
    logits = noise @ (vectors * values.clamp(min=0).sqrt()).T
    chosen = logits.topk(top_k, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=len(router))
    return counts * (len(router) / chosen.numel())


def _expert_facts(
    layer: SavedLayer, A: Tensor, B: Tensor, norms: Tensor, shares: Tensor, finite: bool
) -> list[ExpertFacts]:
    moved: list[float | None] = [None] * len(B)
    if layer.start is not None and finite:
        A0, B0 = layer.start[0].double(), layer.start[1].double()
        # [B, -B0] [A, A0]^T, rather than the difference of three inner products, which would cancel.
        both = torch.cat([A, A0], 2), torch.cat([B, -B0], 2)
        squares = _inner_products(*both, *both).diagonal().clamp(min=0)
        moved = (layer.scaling * squares.sqrt()).tolist()
    found = []
    for i in range(len(B)):
        A_i = A[i if len(A) > 1 else 0]
        found.append(
            ExpertFacts(
                norm_A=A_i.norm().item(),
                norm_B=B[i].norm().item(),
                norm=layer.scaling * norms[i].item(),
                moved=moved[i],
                condition_A=_condition(A_i),
                condition_B=_condition(B[i]),
                share=shares[i].item(),
            )
        )
    return found


def _inner_products(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """(E, E): <B_i A_i^T, B2_j A2_j^T>, for A (E or 1, I, r) and B (E, O, r); E r^2 numbers at a time."""
    rows = []
    for i in range(len(B)):
        gram_A = A[i if len(A) > 1 else 0].T @ A2
        rows.append((gram_A * (B[i].T @ B2)).sum((1, 2)))
    return torch.stack(rows)


def _condition(factor: Tensor) -> float:
    """Largest over smallest eigenvalue of the Gram matrix of (n, r)."""
    if not factor.isfinite().all():
        return torch.nan
    values = torch.linalg.eigvalsh(factor.T @ factor)
    # Below the rounding of the largest one an eigenvalue is zero.
    smallest = values[0] if values[0] > values[-1] * len(values) * torch.finfo(values.dtype).eps else values[0] * 0
    return (values[-1] / smallest).item() if smallest > 0 else torch.inf


def _shared_norm(layer: SavedLayer) -> float | None:
    if layer.shared is None:
        return None
    A, B = (factor.double() for factor in layer.shared)
    return layer.scaling * _inner_products(A, B, A, B)[0, 0].clamp(min=0).sqrt().item()
