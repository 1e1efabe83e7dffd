"""A small regression model with a mixture of experts in its base, adapted by PEFT's LoRA on the stacked parameters."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ds_moelora import tag_lora_pairs

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """E experts down(silu(gate x) * up x), as transformers stores them: (E, 2 f, d) and (E, d, f)."""

    def __init__(self, num_experts: int, features: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * inner, features) / features**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, features, inner) / inner**0.5)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        gate, up = torch.einsum("ti,eoi->eto", x, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("eti,eoi->eto", nn.functional.silu(gate) * up, self.down_proj)
        return torch.einsum("te,eto->to", gates, y)


class MoE(nn.Module):
    """7 -> a mixture of 3 experts of width 5 -> 3."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(7, 3)
        self.experts = Experts(3, 7, 5)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        return (self.head(x + self.experts(x, gates)) - target).square().mean()


def stacked_lora(tagged: bool = True, adapters: int = 1, **options: Any) -> nn.Module:
    """MoE with PEFT LoRA of rank 2 per expert, B away from zero. Several adapters: the last one is active."""
    torch.manual_seed(0)
    config = {"r": 2, "lora_alpha": 4, "target_parameters": TARGETS, "init_lora_weights": False, **options}
    model = get_peft_model(MoE(), LoraConfig(**config))
    for i in range(1, adapters):
        model.add_adapter(f"other{i}", LoraConfig(**config))
        model.set_adapter(f"other{i}")
    if tagged:
        assert tag_lora_pairs(model) == 2 * adapters
    return model
