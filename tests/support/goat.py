"""A small model whose experts start from singular values, in any topology."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from ds_moelora import MoELoRAConfig
from ds_moelora.tuner import MoELoRALayer

from .adapter_support import train_step


class Regression(nn.Module):
    """7 -> 12 -> 9 -> 3 on (tokens, 7); returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(7, 12), nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.head(self.second(self.first(x).tanh()).tanh()) - target).square().mean()


FIELDS: dict[str, Any] = {
    "r": 2,
    "num_experts": 3,
    "top_k": 2,
    "target_modules": ["first", "second"],
    "modules_to_save": ["head"],
    "init_lora_weights": "goat",
    "scaling": "goat",
    "router_aux_loss_coef": 0.1,
}


def base(partitioned: dict[str, Any] | None = None) -> nn.Module:
    """`partitioned`: a DeepSpeed config; the weights are then cut up over the ranks as they are made (`zero.Init`)."""
    torch.manual_seed(0)
    if partitioned is None:
        return Regression()
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=partitioned, dtype=torch.float32):
        return Regression()


def goat_model(gate_scaling: str = "none", partitioned: dict[str, Any] | None = None, **fields: Any) -> nn.Module:
    """`gate_scaling`: what an optimizer would set in the layers."""
    model = get_peft_model(base(partitioned), MoELoRAConfig(**{**FIELDS, **fields}))
    for layer in layers(model):
        gate = layer.experts("default").pair.gate
        assert gate is not None
        gate.gate_scaling = gate_scaling
    return model


def layers(model: nn.Module) -> list[MoELoRALayer]:
    return [module for module in model.modules() if isinstance(module, MoELoRALayer)]


# For models of transformers, which are called with keywords.


GOAT: dict[str, Any] = {"init_lora_weights": "goat", "scaling": "goat"}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def largest(a: Tensor, b: Tensor) -> float:
    """The largest deviation."""
    return (a - b).abs().max().item()


def train(model: Any, inputs: dict[str, Tensor], steps: int = 3) -> Any:
    """The model, after some steps of plain SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        train_step(model, inputs)
        optimizer.step()
    return model
