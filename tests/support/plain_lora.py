"""Plain PEFT LoRA on a small regression model: the jobs that users already have."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ds_moelora import tag_lora_pairs


class MLP(nn.Module):
    """7 -> 5 -> 11 -> 3, frozen by PEFT but for what the adapter adds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 11)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        return (self.head(x) - target).square().mean()


def plain_lora(adapters: int = 1, tagged: bool = True, **options: Any) -> nn.Module:
    """MLP with PEFT LoRA of rank 3 and B away from zero. Several adapters: the last one is active."""
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False, **options}
    model = get_peft_model(MLP(), LoraConfig(**config))
    for i in range(1, adapters):
        model.add_adapter(f"other{i}", LoraConfig(**{**config, "r": 2}))
        model.set_adapter(f"other{i}")
    if tagged:
        assert tag_lora_pairs(model) == 2 * adapters
    return model
