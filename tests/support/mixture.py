"""A small regression model of mixtures of LoRA experts, written plainly: it shares nothing with the adapter's code.

Sizes are odd and B starts away from zero, so that no boundary of any partition falls where it would be convenient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_moelora.pairs import LoraPair, tag_pair


class Mixture(nn.Module):
    """`y = W x + s * sum_{i in topk} g_i(x) B_i A_i x`, W frozen."""

    def __init__(self, name: str, in_features: int, out_features: int, experts: int, rank: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.scaling = min(top_k, experts), 0.5
        self.base = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(experts, in_features, rank) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.randn(experts, out_features, rank) / out_features**0.5)
        self.router = nn.Linear(in_features, experts, bias=False)
        self.tag(name)

    def tag(self, name: str) -> None:
        experts, _, rank = self.lora_A.shape
        pair = LoraPair(name, experts, rank, self.scaling)
        tag_pair(pair, self.lora_A, self.lora_B, self.router.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits, chosen = self.router(x).topk(self.top_k)
        gates = torch.zeros(*x.shape[:-1], len(self.lora_A), dtype=x.dtype, device=x.device)
        gates = gates.scatter(-1, chosen, logits.softmax(-1).to(x.dtype))
        projected = torch.einsum("ti,eir->ter", x, self.lora_A)
        return self.base(x) + self.scaling * torch.einsum("ter,eor,te->to", projected, self.lora_B, gates)


class Stack(nn.Module):
    """Mixtures of the given shapes one after the other, with biases and a head that belong to no pair."""

    def __init__(self, shapes: list[tuple[int, int, int, int]], top_k: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Mixture(f"layers.{i}", *shape, top_k) for i, shape in enumerate(shapes))
        self.norms = nn.ModuleList(nn.LayerNorm(shape[1]) for shape in shapes)
        self.head = nn.Linear(shapes[-1][1], 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).tanh()
        return (self.head(x) - target).square().mean()


class SharedStack(Stack):
    """As Stack, with a mixture that is used twice (one pair, two gradients), a frozen pair and a tied head."""

    def __init__(self, shapes: list[tuple[int, int, int, int]], top_k: int = 2, seed: int = 0) -> None:
        super().__init__(shapes, top_k, seed)
        width = shapes[-1][1]
        self.shared = Mixture("shared", width, width, 3, 2, top_k)
        self.frozen = Mixture("frozen", width, width, 2, 3, top_k).requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.tied = nn.Linear(width, 3)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).tanh()
        x = self.norm(self.shared(self.frozen(self.shared(x)).tanh()))
        return (self.head(x) + self.tied(x.tanh()) - target).square().mean()


# (in, out, experts, rank): odd everywhere; the last has more columns than a small partition has elements.
SHAPES = [(7, 5, 3, 3), (5, 11, 2, 5), (11, 7, 3, 3)]


def batches(steps: int, micro: int, world: int, tokens: int = 6, seed: int = 1) -> list[list[list[Any]]]:
    """Data by step, micro-batch and rank."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> tuple[Tensor, Tensor]:
        return (
            torch.randn(tokens, SHAPES[0][0], generator=generator),
            torch.randn(tokens, 3, generator=generator),
        )

    return [[[one() for _ in range(world)] for _ in range(micro)] for _ in range(steps)]
