"""The contenders of the layer's benchmarks: one adapted linear layer each, with equal sizes and the same base weight.

base     the frozen linear layer alone
peft     PEFT's LoRA of rank E*r: as many trainable weights, but for the router; the floor for a mixture
loop     y + s * sum_i g_i B_i A_i x as a loop over experts, all tokens through each, the way published code does it
dense, grouped, fused
         this package's layer with that `expert_compute`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ds_moelora import MoELoRAConfig


@dataclass(frozen=True)
class Size:
    """One layer: E experts of rank r, k of them per token; in and out features; tokens."""

    experts: int
    top_k: int
    rank: int
    in_features: int
    out_features: int
    tokens: int

    @property
    def columns(self) -> int:
        """E*r."""
        return self.experts * self.rank

    @property
    def base_flops(self) -> float:
        """Of the frozen layer: its output and the gradient of its input."""
        return 4.0 * self.tokens * self.in_features * self.out_features

    @property
    def bound(self) -> float:
        """FLOPs of forward and backward of a dense mixture, as a multiple of the frozen layer's.

        1 + 1.5 E r (1/in + 1/out) for six products with the stacked factors beside two with W; 1.5 E / out for the
        router's three.
        """
        E, inverse = self.experts, 1 / self.in_features + 1 / self.out_features
        return 1 + 1.5 * self.columns * inverse + 1.5 * E / self.out_features


class Loop(nn.Module):
    """The mixture as a loop over experts; gradients by autograd."""

    def __init__(self, base: nn.Linear, size: Size, scaling: float) -> None:
        super().__init__()
        self.base, self.top_k, self.scaling = base, size.top_k, scaling
        kwargs = {"bias": False, "dtype": base.weight.dtype, "device": base.weight.device}
        self.router = nn.Linear(size.in_features, size.experts, **kwargs)
        self.A = nn.ModuleList(nn.Linear(size.in_features, size.rank, **kwargs) for _ in range(size.experts))
        self.B = nn.ModuleList(nn.Linear(size.rank, size.out_features, **kwargs) for _ in range(size.experts))

    def forward(self, x: Tensor) -> Tensor:
        y, probabilities = self.base(x), F.softmax(self.router(x), dim=-1)
        kept = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(self.top_k).indices, 1.0)
        gates = probabilities * kept
        gates = gates / gates.sum(-1, keepdim=True)
        for i, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
            y = y + self.scaling * gates[..., i : i + 1] * B(A(x))
        return y


class _Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def _adapted(base: nn.Linear, config: LoraConfig | MoELoRAConfig) -> nn.Module:
    """The adapted layer. All weights have the base's dtype, as in a bf16 model that DeepSpeed trains."""
    model = get_peft_model(_Net(base), config, autocast_adapter_dtype=False)
    with torch.no_grad():  # no zeros: their products might be cheaper
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.base_model.model.layer


def lora(size: Size) -> LoraConfig:
    """PEFT's, of rank E*r."""
    return LoraConfig(r=size.columns, lora_alpha=2 * size.columns, target_modules=["layer"], lora_dropout=0.0)


def mixture(size: Size, compute: str, balance: float = 0.0) -> MoELoRAConfig:
    """This package's, of the same size; `balance`: the balance loss's coefficient."""
    return MoELoRAConfig(
        r=size.rank,
        num_experts=size.experts,
        top_k=size.top_k,
        lora_alpha=2 * size.rank,
        target_modules=["layer"],
        expert_compute=compute,
        router_aux_loss_coef=balance,
    )


def contenders(
    size: Size,
    dtype: torch.dtype,
    device: str = "cpu",
    loop: bool = True,
    computes: Sequence[str] = ("dense", "grouped"),
) -> dict[str, nn.Module]:
    """Name -> layer; (..., in) -> (..., out)."""
    torch.manual_seed(0)
    weight = torch.randn(size.out_features, size.in_features) * size.in_features**-0.5

    def base() -> nn.Linear:
        linear = nn.Linear(size.in_features, size.out_features, bias=False, dtype=dtype, device=device)
        linear.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        return linear

    layers = {"base": base(), "peft": _adapted(base(), lora(size))}
    if loop:
        layers["loop"] = Loop(base(), size, scaling=2.0)
    for compute in computes:
        layers[compute] = _adapted(base(), mixture(size, compute))
    return layers


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward and backward, with gradients for x and the adapter that no earlier step has left behind."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(dy)

    return step


def decoding_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward alone, without autograd, of a layer whose adapter is frozen as PEFT loads it for inference."""
    layer.eval().requires_grad_(False)

    def step() -> None:
        with torch.no_grad():
            layer(x)

    return step
