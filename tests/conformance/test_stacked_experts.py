"""PEFT's LoRA on stacked experts (`target_parameters`) is E pairs per parameter, exact at every stage."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from ds_moelora.pairs import tag_of

from ..support.ranks import run_on_ranks
from ..support.stacked_experts import stacked_lora
from ..support.training import SHARDED, deviation, engine_config, loraplus_groups, run_engine, run_reference

pytestmark = pytest.mark.dist

TOLERANCE = 2e-5
SETTINGS = [*itertools.product(SHARDED[:1], [0, 1, 2, 3], [1, 2, 3, 4]), *itertools.product(SHARDED[1:], [2, 3], [3])]


@functools.cache
def reference(kind: str, world: int, adapters: int) -> dict[str, Any]:
    return run_reference(kind, world, model=functools.partial(stacked_lora, adapters=adapters))["weights"]


@pytest.mark.parametrize(("kind", "stage", "world"), SETTINGS)
def test_equals_the_reference(kind: str, stage: int, world: int, report: Callable[[str, str], None]) -> None:
    adapters = 1 + (world == 4)
    model = functools.partial(stacked_lora, tagged=False, adapters=adapters)
    results = run_on_ranks(world, run_engine, config=engine_config(stage, kind), model=model)
    found = max(deviation(result["weights"], reference(kind, world, adapters)) for result in results)
    report(
        "LoRA on stacked experts: maximum relative deviation from the float64 reference after 10 steps",
        f"{kind:20s} stage {stage} world {world} adapters {adapters}: {found:.1e}",
    )
    assert found < TOLERANCE
    if stage == 0 or world == 1:
        assert not results[0]["traffic"][-1]
        return
    # One assembles the experts of lora_A that a boundary cuts; one carries Gram matrices and cut rows.
    *assembling, (numel, _) = results[0]["traffic"][-1]
    spaces = 4 * adapters if stage == 3 else 1  # what is cut by itself
    widest, widest_row, grams = 2 * 7, 2 * 3, adapters * 4 * 3 * 2 * 2
    assert len(assembling) <= 1
    assert sum(n for n, _ in assembling) <= 2 * spaces * (world - 1) * widest
    assert numel <= (2 if kind == "GateRiemannianMuon" else 1) * grams + 2 * spaces * (world - 1) * widest_row


def test_kernels() -> None:
    config = engine_config(2, "GateRiemannianAdamW")
    config["optimizer"]["params"]["compiled"] = True
    (found, _) = run_on_ranks(2, run_engine, config=config, model=stacked_lora)
    assert deviation(found["weights"], reference("GateRiemannianAdamW", 2, 1)) < TOLERANCE


def test_pairs_in_two_groups() -> None:
    run = functools.partial(run_on_ranks, 3, run_engine, model=stacked_lora, groups=loraplus_groups)
    kind = "GateRiemannianAdamW"
    expected = run_reference(kind, 3, model=stacked_lora, groups=loraplus_groups)["weights"]
    for stage in (1, 3):
        assert deviation(run(config=engine_config(stage, kind))[0]["weights"], expected) < TOLERANCE


def test_every_expert_is_a_pair_of_its_own() -> None:
    """Preconditioned as one pair of rank E r, as plain LoRA would be, the weights end elsewhere."""
    kind = "GateRiemannianAdamW"

    def as_one_pair() -> torch.nn.Module:
        model = stacked_lora()
        for param in model.parameters():
            tag = tag_of(param)
            if tag is not None and tag[0].num_experts > 1:
                pair = tag[0]
                pair.rank, pair.num_experts, pair.experts_last_B = pair.rank * pair.num_experts, 1, False
        return model

    assert deviation(run_reference(kind, 1, model=as_one_pair)["weights"], reference(kind, 1, 1)) > 1e-2


def test_layout_is_the_wrappers_own() -> None:
    model = stacked_lora()
    for layer in (module for module in model.modules() if isinstance(module, ParamWrapper)):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        (pair, _), E = tag_of(A), layer.num_experts  # type: ignore[misc]
        assert (pair.num_experts, pair.rank, pair.scaling) == (3, 2, 2.0)
        product = pair.scaling * torch.stack([B[:, e::E] @ A[2 * e : 2 * e + 2] for e in range(E)])
        torch.testing.assert_close(layer.get_delta_weight("default"), product)
