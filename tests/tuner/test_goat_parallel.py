"""Experts from singular values under ZeRO, zero.Init and expert parallelism: the same as in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.svd import singular_triplets
from ds_moelora.tuner.start import svd_init

from ..support.expert_parallel import Net, batches, run
from ..support.goat import base, goat_model, layers
from ..support.ranks import run_on_ranks
from ..support.training import deviation, engine_config, run_engine, run_reference

pytestmark = pytest.mark.dist

# As in test_zero_exactness.py: fp32 against float64 after 10 steps. Seen: below 2e-6.
TOLERANCE = 1e-5
TITLE = "GOAT after 10 steps (maximum relative deviation of the weights)"


def config_for(stage: int, kind: str) -> dict[str, Any]:
    config = engine_config(stage, kind, clip=1.0)
    config["optimizer"]["params"]["include_scaling"] = True
    return config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["GateRiemannianAdamW", "GateRiemannianSGD"])
def test_training_equals_the_reference(kind: str, stage: int, report: Callable[[str, str], None]) -> None:
    """Riemannian steps with include_scaling on GOAT's experts; at stage 3 the base is partitioned from the start."""
    config = config_for(stage, kind)
    model = functools.partial(goat_model, partitioned=config if stage == 3 else None)
    results = run_on_ranks(2, run_engine, config=config, model=model)
    whole = functools.partial(goat_model, gate_scaling="sqrt")
    reference = run_reference(kind, 2, model=whole, clip=1.0, include_scaling=True)
    found = max(deviation(result["weights"], reference["weights"]) for result in results)
    report(TITLE, f"{kind:20s} stage {stage}, from the float64 reference: {found:.1e}")
    assert found < TOLERANCE


EXPERT_PARALLEL = {"init_lora_weights": "goat", "scaling": "goat", "num_experts": 2, "r": 2}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_expert_parallel_equals_one_rank(stage: int, report: Callable[[str, str], None]) -> None:
    config = config_for(stage, "GateRiemannianSGD")
    wanted = run_on_ranks(2, run, config=config, model=EXPERT_PARALLEL)[0]
    for dispatch in ("weights", "tokens"):
        model = {**EXPERT_PARALLEL, "ep_size": 2, "ep_dispatch": dispatch}
        found = run_on_ranks(2, run, config=config, model=model)[0]
        assert deviation(found["first"], wanted["first"]) == 0
        after = deviation(found["weights"], {n: w.double() for n, w in wanted["weights"].items()})
        report(TITLE, f"GateRiemannianSGD    stage {stage} world 2 ep 2 {dispatch}, from ep 1: {after:.1e}")
        assert after < TOLERANCE


def outputs(path: str, ep_size: int) -> dict[str, Any]:
    """On every rank: the loss of a saved adapter, and of the base model below it, as the engine computes them.

    And the base weight that unloading gives back, or why it does not.
    """
    import deepspeed

    config = MoELoRAConfig.from_pretrained(path)
    config.ep_size = ep_size
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), path, config=config, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = engine_config(1, "GateRiemannianSGD")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    engine.eval()
    x, target = batches(1, 1, 1)[0][0][0]
    with torch.no_grad():
        result = {"adapted": engine(x, target)["loss"].item()}
        with engine.module.disable_adapter():
            result["base"] = engine(x, target)["loss"].item()
        try:
            result["unloaded"] = engine.module.unload().second.weight.detach()
        except ValueError as error:
            result["refused"] = str(error)
    engine.destroy()
    return result


@pytest.mark.parametrize("saved_with", [1, 2])
def test_saved_under_one_ep_size_loads_under_any(saved_with: int, tmp_path: Any) -> None:
    model = {**EXPERT_PARALLEL, "ep_size": saved_with}
    config = config_for(1, "GateRiemannianSGD")
    run_on_ranks(2, run, config=config, steps=3, model=model, export=str(tmp_path))
    torch.manual_seed(0)
    plain = Net().eval()
    x, target = batches(1, 1, 1)[0][0][0]
    # modules_to_save: the trained head is on both sides of the comparison with the base.
    here = PeftModel.from_pretrained(copy_of(plain), str(tmp_path)).eval()
    wanted = here(x, target)["loss"].item()
    for ep_size in (1, 2):
        for found in run_on_ranks(2, outputs, path=str(tmp_path), ep_size=ep_size):
            assert abs(found["adapted"] - wanted) < 1e-6
            assert abs(found["base"] - plain(x, target)["loss"].item()) < 1e-6
            if ep_size == 1:
                torch.testing.assert_close(found["unloaded"], plain.second.weight.detach(), rtol=0, atol=1e-7)
            else:
                assert "no rank has all starting factors" in found["refused"]


def copy_of(model: Net) -> Net:
    copy = Net()
    copy.load_state_dict(model.state_dict())
    return copy


def starting_values() -> dict[str, Any]:
    """On every rank: factors and folded weights, and which decompositions this rank made."""
    computed: list[tuple[int, ...]] = []

    def counted(weight: Tensor, *args: Any) -> Any:
        computed.append(tuple(weight.shape))
        return singular_triplets(weight, *args)

    original, svd_init.singular_triplets = svd_init.singular_triplets, counted
    try:
        model = goat_model()
    finally:
        svd_init.singular_triplets = original
    values = {}
    for layer in layers(model):
        name = layer.experts("default").pair.name
        values[name] = torch.cat([layer.experts("default").lora_A.flatten(), layer.base_layer.weight.flatten()])
    return {"values": {name: value.detach() for name, value in values.items()}, "computed": computed}


def test_starting_values_are_equal_to_the_bit_and_each_is_computed_once() -> None:
    wanted = starting_values()
    by_rank = run_on_ranks(2, starting_values)
    assert len(wanted["computed"]) == 2
    assert sorted(shape for found in by_rank for shape in found["computed"]) == sorted(wanted["computed"])
    assert all(len(found["computed"]) == 1 for found in by_rank)
    for found in by_rank:
        for name, value in wanted["values"].items():
            assert torch.equal(found["values"][name], value)


def failing_rank() -> str:
    """On every rank: the message with which all stop, when rank 1 cannot decompose its layer."""

    def broken(weight: Tensor, *args: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("the disk is full")
        return singular_triplets(weight, *args)

    original, svd_init.singular_triplets = svd_init.singular_triplets, broken
    try:
        goat_model()
    except ValueError as error:
        return str(error)
    finally:
        svd_init.singular_triplets = original
    return "no error"


def test_a_failure_on_one_rank_stops_all_with_its_message() -> None:
    for message in run_on_ranks(2, failing_rank):
        assert "rank 1" in message
        assert "second: the disk is full" in message


def largest_gather() -> int:
    """On every rank: how many numbers were gathered at once, at most, to make the adapter on a partitioned model."""
    import deepspeed

    sizes = []

    class Counted(deepspeed.zero.GatheredParameters):  # type: ignore[misc]
        def __init__(self, params: Any, **kwargs: Any) -> None:
            sizes.append(sum(p.ds_numel for p in params))
            super().__init__(params, **kwargs)

    original, deepspeed.zero.GatheredParameters = deepspeed.zero.GatheredParameters, Counted
    try:
        goat_model(partitioned=engine_config(3, "GateRiemannianSGD"))
    finally:
        deepspeed.zero.GatheredParameters = original
    return max(sizes)


def test_one_layer_at_a_time_is_gathered() -> None:
    assert run_on_ranks(2, largest_gather) == [12 * 9 + 9] * 2


def loaded_on_partitioned(path: str) -> dict[str, Any]:
    """On every rank: a saved adapter loaded onto a base that is cut up over the ranks, then run by a stage-3 engine."""
    import deepspeed

    settings = engine_config(3, "GateRiemannianSGD")
    model = PeftModel.from_pretrained(base(partitioned=settings), path, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)
    engine.eval()
    x, target = torch.linspace(-1, 1, 42).view(6, 7), torch.ones(6, 3)
    with torch.no_grad():
        result = {"adapted": engine(x, target).item()}
        with engine.module.disable_adapter():
            result["base"] = engine(x, target).item()
    result["folded"] = all(layer.experts("default").residual.folded for layer in layers(engine.module))
    engine.destroy()
    return result


def test_loads_onto_a_partitioned_base(tmp_path: Any) -> None:
    model = goat_model()
    with torch.no_grad():
        for layer in layers(model):
            layer.experts("default").lora_B.mul_(-3)
    model.save_pretrained(tmp_path)
    x, target = torch.linspace(-1, 1, 42).view(6, 7), torch.ones(6, 3)
    wanted, original = model.eval()(x, target).item(), base()(x, target).item()
    assert abs(wanted - original) > 1e-3
    for found in run_on_ranks(2, loaded_on_partitioned, path=str(tmp_path)):
        assert found["folded"]
        assert abs(found["adapted"] - wanted) < 1e-6
        assert abs(found["base"] - original) < 1e-6


def made_inside_zero_init() -> list[Tensor]:
    """On every rank: one layer's factors and starting factors, made inside `zero.Init`, which cuts them up at once."""
    import deepspeed

    settings = engine_config(3, "GateRiemannianSGD")
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.float32):
        model = goat_model(partitioned=settings)
    experts = layers(model)[0].experts("default")
    assert all(factor.numel() == 0 for factor in experts.factors())
    with deepspeed.zero.GatheredParameters(list(experts.factors())):
        return [factor.detach().clone() for factor in (*experts.factors(), *experts.initial_factors())]


def test_adapter_made_inside_zero_init() -> None:
    wanted = layers(goat_model())[0].experts("default").factors()
    for found in run_on_ranks(2, made_inside_zero_init):
        for values, exact in zip(found, (*wanted, *wanted), strict=True):
            assert torch.equal(values, exact)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16(stage: int) -> None:
    """Half precision: no further from its float64 reference than a plain mixture in half precision is (times 2).

    All experts are chosen (top_k = E): rounding would otherwise send tokens elsewhere, in both.
    """
    found = {}
    for name, fields in {"goat": {}, "plain": {"init_lora_weights": False}}.items():
        config = engine_config(stage, "GateRiemannianSGD", precision="bf16")
        config["optimizer"]["params"]["include_scaling"] = True
        model = functools.partial(goat_model, top_k=3, **fields)
        results = run_on_ranks(2, run_engine, config=config, model=model)
        whole = functools.partial(model, gate_scaling="sqrt")
        reference = run_reference("GateRiemannianSGD", 2, model=whole, precision="bf16", include_scaling=True)
        found[name] = deviation(results[0]["weights"], reference["weights"])
    assert found["goat"] < 2 * found["plain"]
