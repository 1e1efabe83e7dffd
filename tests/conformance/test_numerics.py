"""Extreme values: singular Gram matrices, tiny and huge factors, a rank whose gradient is not finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ..support.mixture import SHAPES, Stack
from ..support.pairwise import pairwise
from ..support.ranks import run_on_ranks
from ..support.training import SHARDED, deviation, engine_config, run_engine, run_reference

pytestmark = pytest.mark.dist

# r > in and r > out in every layer, so that every Gram matrix of A or B is singular.
DEEP = [(7, 5, 2, 9), (5, 11, 2, 13), (11, 7, 1, 12)]


def zero_b() -> nn.Module:
    model = Stack(SHAPES)
    for layer in model.layers:
        nn.init.zeros_(layer.lora_B)
    return model


def duplicate_columns() -> nn.Module:
    model = Stack(SHAPES)
    with torch.no_grad():
        for layer in model.layers:
            layer.lora_A[..., 1] = layer.lora_A[..., 0]
            layer.lora_B[..., 1] = layer.lora_B[..., 0]
    return model


def scales(small: float) -> nn.Module:
    """Experts whose factors differ by many orders of magnitude; the product stays as it was."""
    model = Stack(SHAPES)
    with torch.no_grad():
        for layer in model.layers:
            layer.lora_A[0] *= small
            layer.lora_B[0] /= small
    return model


# With tolerances. An fp32 solve is good to eps * cond(G + d I) = 6e-8 * trace / d, here (d = 1e-4, a trace of a few)
# 2e-3 where G is singular, at any stage and also without ZeRO; AdamW divides by the size of what is left in G's null
# space, where there is little but rounding. B = 0 starts with G = 0, which is as well conditioned as can be.
CASES: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "B = 0": (zero_b, 1e-4),
    "duplicate columns": (duplicate_columns, 1e-1),
    "r > in, r > out": (functools.partial(Stack, DEEP), 1e-2),
    "A * 1e-4, B * 1e4": (functools.partial(scales, 1e-4), 1e-5),
}


SETTINGS = {"name": list(CASES), "kind": SHARDED, "stage": [0, 2, 3]}


@pytest.mark.parametrize(
    ("name", "kind", "stage"), [tuple(case.values()) for case in pairwise(SETTINGS, lambda case: True)]
)
def test_singular(name: str, kind: str, stage: int, report: Callable[[str, str], None]) -> None:
    model, tolerance = CASES[name]
    config, damping = engine_config(stage, kind), 1e-4
    if (name, kind) == ("r > in, r > out", "GateRiemannianMuon"):
        # Along what the other factor does not see, a step has length lr / (2 sqrt(d)): at d = 1e-4 as much as a weight,
        # and whether what momentum left there is more than rounding is decided by rounding (deviations of 0.1).
        damping = 1e-2
    config["optimizer"]["params"]["damping"] = damping
    results = run_on_ranks(3, run_engine, config=config, model=model, steps=5)
    reference = run_reference(kind, 3, model=model, steps=5, damping=damping)["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    report("Singular Gram matrices, 5 steps, 3 ranks", f"{name:20s} {kind:20s} stage {stage}: {found:.1e}")
    assert found < tolerance


def tiny_or_huge(scale: float) -> nn.Module:
    model = Stack(SHAPES)
    with torch.no_grad():
        model.layers[1].lora_A[0] *= scale
        model.layers[1].lora_B[0] *= min(scale, 1 / scale)
    return model


def train_once(stage: int, scale: float) -> list[dict[str, torch.Tensor]]:
    config = engine_config(stage, "GateRiemannianSGD")
    config["optimizer"]["params"]["lr"] = 1e-9
    model = functools.partial(tiny_or_huge, scale)
    return [r["weights"] for r in run_on_ranks(2, run_engine, config=config, model=model, steps=1)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_factors_of_1e_minus_20(stage: int) -> None:
    """Squares vanish in fp32; the damping alone is left of the Gram matrix, as it is in exact arithmetic."""
    for weights in train_once(stage, 1e-20):
        assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_factors_of_1e_plus_20(stage: int) -> None:
    """Squares overflow fp32: the partner's update is NaN in that expert, on every rank alike, and nowhere else."""
    everywhere = train_once(stage, 1e20)
    for weights in everywhere:
        assert weights["layers.1.lora_B"][0].isnan().all()
        assert weights["layers.1.lora_B"][1:].isfinite().all()
        assert all(w.isfinite().all() for n, w in weights.items() if n not in ("layers.1.lora_B", "layers.1.lora_A"))
        for name, w in weights.items():
            assert torch.equal(w.nan_to_num(), everywhere[0][name].nan_to_num())


class PoisonedStack(Stack):
    """The given rank's loss is not finite in its third step."""

    def __init__(self, value: float) -> None:
        super().__init__(SHAPES)
        self.value, self.calls = value, 0

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = super().forward(x, target)
        poisoned = self.calls == 3 and torch.distributed.get_rank() == 1
        return loss * self.value if poisoned else loss


def run_poisoned(kind: str, stage: int, value: float) -> list[dict[str, Any]]:
    config = engine_config(stage, kind)
    return run_on_ranks(2, run_engine, config=config, model=functools.partial(PoisonedStack, value), steps=5)


@pytest.mark.parametrize(("stage", "value"), [(0, math.nan), (1, math.inf), (2, math.nan), (3, math.inf)])
def test_one_rank_with_a_gradient_that_is_not_finite(stage: int, value: float) -> None:
    """No hang, and all ranks end alike: DeepSpeed skips the step where it checks, as it does with plain AdamW."""
    ours = run_poisoned("GateRiemannianAdamW", stage, value)
    plain = run_poisoned("AdamW", stage, value)
    assert ours[0]["skipped"] == ours[1]["skipped"] == plain[0]["skipped"]
    for name, w in ours[0]["weights"].items():
        assert torch.equal(w.nan_to_num(), ours[1]["weights"][name].nan_to_num())
        assert w.isfinite().all() == plain[0]["weights"][name].isfinite().all(), name
