"""`include_scaling`: the step of s B A, whatever part of the product is in s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_moelora import GateRiemannianAdamW, GateRiemannianSGD
from ds_moelora.pairs import LoraPair, tag_pair

from ..support.mixture import SHAPES, Stack
from ..support.ranks import run_on_ranks
from ..support.training import deviation, engine_config, run_engine, run_reference


class Product(nn.Module):
    """W = s sum_i B_i A_i, and a gradient of W that depends on W."""

    def __init__(self, scaling: float, split: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        E, I, O, R = 3, 5, 6, 2
        A, B = (torch.randn(E, n, R, generator=generator, dtype=torch.float64) for n in (I, O))
        self.scaling, self.lora_A, self.lora_B = scaling * split, *(nn.Parameter(f / split**0.5) for f in (A, B))
        tag_pair(LoraPair("product", E, R, self.scaling), self.lora_A, self.lora_B)

    def weight(self) -> torch.Tensor:
        return self.scaling * torch.einsum("eir,eor->oi", self.lora_A, self.lora_B)


def trained_product(kind: type, split: float, **options: Any) -> torch.Tensor:
    model = Product(0.7, split)
    optimizer = kind(model.parameters(), damping=0.0, **options)
    for _ in range(3):
        optimizer.zero_grad()
        (model.weight() - torch.eye(6, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    return model.weight().detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_does_not_see_how_the_product_is_split(momentum: float) -> None:
    """(A, B, s) -> (A / sqrt(c), B / sqrt(c), c s), c up to 100: the same products to float64 rounding."""
    options = {"lr": 0.05, "momentum": momentum, "include_scaling": True}
    wanted = trained_product(GateRiemannianSGD, 1.0, **options)
    for split in (0.01, 3.0, 100.0):
        torch.testing.assert_close(trained_product(GateRiemannianSGD, split, **options), wanted, rtol=1e-11, atol=1e-12)
    published = [trained_product(GateRiemannianSGD, split, lr=0.05, momentum=momentum) for split in (1.0, 3.0)]
    assert (published[0] - published[1]).abs().max() > 1e-2


def test_adamw_does_not_see_s_but_for_eps() -> None:
    """s^2 is one constant per pair, and Adam divides by the size of the gradients."""
    options = {"lr": 1e-3, "eps": 0.0}
    with_s, without = (
        trained_product(GateRiemannianAdamW, 1.0, include_scaling=value, **options) for value in (True, False)
    )
    torch.testing.assert_close(with_s, without, rtol=1e-9, atol=1e-12)


def scaled_config(stage: int, kind: str) -> dict[str, Any]:
    config = engine_config(stage, kind)
    config["optimizer"]["params"]["include_scaling"] = True
    return config


def unequal_stack() -> Stack:
    """Every layer has another s, as with `scaling="goat"`."""
    model = Stack(SHAPES)
    for i, layer in enumerate(model.layers):
        layer.scaling = 0.5 + i
        layer.tag(f"layers.{i}")
    return model


@pytest.mark.dist
@pytest.mark.parametrize(
    ("kind", "stage"),
    [("GateRiemannianSGD", 0), ("GateRiemannianAdamW", 1), ("GateRiemannianSGD", 2), ("GateRiemannianAdamW", 3)],
)
def test_exact_under_zero(kind: str, stage: int, report: Callable[[str, str], None]) -> None:
    results = run_on_ranks(2, run_engine, config=scaled_config(stage, kind), model=unequal_stack)
    reference = run_reference(kind, 2, model=unequal_stack, include_scaling=True)["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    title = "include_scaling, world 2, after 10 steps (maximum relative deviation from the float64 reference)"
    report(title, f"{kind:20s} stage {stage}: {found:.1e}")
    assert found < 1e-5
    assert deviation(reference, run_reference(kind, 2, model=unequal_stack)["weights"]) > 1e-3
