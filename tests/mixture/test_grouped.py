"""The grouped products, and starting values, on one process."""

from __future__ import annotations

import pytest
import torch

from ds_moelora.mixture.choice import choose_products
from ds_moelora.mixture.initial_values import draw_uniform_, expert_seed

from ..support.adapter_support import adapted, assert_same, batch, train_step


def test_grouped_in_a_model() -> None:
    loss, gradients = train_step(adapted(expert_compute="dense"), batch())
    other_loss, others = train_step(adapted(expert_compute="grouped"), batch())
    torch.testing.assert_close(loss, other_loss)
    assert_same(others, gradients, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("auto", 8, 2, 4), "dense"),
        (("auto", 32, 2, 8), "grouped"),
        (("auto", 64, 8, 8), "dense"),
        (("auto", 64, 8, 16), "grouped"),
        (("dense", 640, 1, 64), "dense"),
        (("grouped", 2, 2, 1), "grouped"),
        (("auto", 64, 2, 16, torch.bfloat16), "dense"),
        (("auto", 128, 2, 16, torch.bfloat16), "grouped"),
    ],
)
def test_auto_goes_by_size(arguments: tuple, expected: str) -> None:
    assert choose_products(*arguments).name == expected


def test_starting_values_belong_to_the_expert() -> None:
    """Whoever draws expert 2 gets the same numbers; every other name, number or seed gives others."""
    torch.manual_seed(5)
    whole, part = torch.empty(4, 3, 2), torch.empty(2, 3, 2)
    draw_uniform_(whole, 0.5, "layer", "default", "lora_A")
    torch.rand(7)  # what else was drawn does not matter
    draw_uniform_(part, 0.5, "layer", "default", "lora_A", first_expert=2)
    assert torch.equal(part, whole[2:])
    assert whole.abs().max() <= 0.5
    assert whole.std() == pytest.approx(0.5 / 3**0.5, rel=0.3)
    changes = [("layer2", "default", "lora_A", 0), ("layer", "other", "lora_A", 0), ("layer", "default", "lora_B", 0)]
    seeds = {expert_seed(*names) for names in [*changes, ("layer", "default", "lora_A", 0), ("l", "d", "lora_A", 1)]}
    torch.manual_seed(6)
    assert len(seeds | {expert_seed("layer", "default", "lora_A", 0)}) == 6


def test_models_start_alike_but_layers_and_experts_differ() -> None:
    one, two = adapted(), adapted()
    first, second = (dict(m.named_parameters()) for m in (one, two))
    drawn = [p for n, p in first.items() if n.endswith((".lora_A", "router.weight"))]
    assert all(torch.equal(first[n], second[n]) for n in first)
    flat = torch.stack([p.detach().flatten()[:8] for p in drawn])
    assert len(torch.unique(flat, dim=0)) == len(drawn)
    assert len(torch.unique(drawn[0].detach().flatten(1), dim=0)) == len(drawn[0])
