"""The ways into DeepSpeed (config name, client optimizer, MoE-LoRA through PEFT), and what it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

from ds_moelora import GateRiemannianAdamW, GateRiemannianSGD, MoELoRAConfig

from ..support.mixture import SHAPES, Stack, batches
from ..support.plain_lora import MLP
from ..support.ranks import run_on_ranks
from ..support.training import OPTIMIZERS, deviation, engine_config, full_weights, one_group, run_engine, run_reference

pytestmark = pytest.mark.dist

CLASSES: dict[str, Any] = {"GateRiemannianAdamW": GateRiemannianAdamW, "GateRiemannianSGD": GateRiemannianSGD}


def moe_lora() -> nn.Module:
    """The adapter itself on a small model: 3 experts of rank 3, two of them chosen."""
    torch.manual_seed(0)
    config = MoELoRAConfig(
        r=3,
        num_experts=3,
        top_k=2,
        target_modules=["first", "second"],
        init_lora_weights=False,
        router_aux_loss_coef=0.0,
    )
    return get_peft_model(MLP(), config)


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 3), (2, 2), (2, 3), (3, 3)])
def test_the_adapter_is_exact(stage: int, world: int) -> None:
    config = engine_config(stage, "GateRiemannianAdamW")
    config["optimizer"]["params"]["gate_scaling"] = "none"  # the reference differentiates the loss as it is
    results = run_on_ranks(world, run_engine, config=config, model=moe_lora)
    reference = run_reference("GateRiemannianAdamW", world, model=moe_lora)["weights"]
    assert max(deviation(result["weights"], reference) for result in results) < 1e-5


@pytest.mark.parametrize("scaling", ["sqrt", "full"])
def test_gate_scaling_of_the_config_reaches_the_adapter(scaling: str) -> None:
    """Stages agree with each other, and differ from gate_scaling "none"."""

    def run(stage: int, scaling: str) -> dict[str, torch.Tensor]:
        config = engine_config(stage, "GateRiemannianSGD")
        config["optimizer"]["params"]["gate_scaling"] = scaling
        return run_on_ranks(2, run_engine, config=config, model=moe_lora)[0]["weights"]

    unsharded = {k: v.double() for k, v in run(0, scaling).items()}
    for stage in (2, 3):
        assert deviation(run(stage, scaling), unsharded) < 1e-5
    assert deviation(run(2, "none"), unsharded) > 1e-3


def train_with_client(kind: str, stage: int, as_callable: bool, **zero: Any) -> dict[str, Any]:
    """On every rank: the optimizer object (or a callable that makes it) is passed to `deepspeed.initialize`."""
    import deepspeed

    model = Stack(SHAPES)

    def make(params: Any) -> Any:
        return CLASSES[kind](params, **OPTIMIZERS[kind])

    config = engine_config(stage, kind, **zero)
    del config["optimizer"]
    config["zero_force_ds_cpu_optimizer"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make if as_callable else make(one_group(model)),
        model_parameters=one_group(model) if as_callable else None,
        config=config,
    )
    for micro in batches(10, 1, dist.get_world_size()):
        engine.backward(engine(*micro[0][dist.get_rank()]))
        engine.step()
    weights = full_weights(engine.module)
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    ("kind", "as_callable", "stage"),
    [
        ("GateRiemannianAdamW", False, 1),
        ("GateRiemannianAdamW", True, 3),
        ("GateRiemannianSGD", True, 1),
        ("GateRiemannianSGD", False, 3),
    ],
)
def test_client_optimizer(kind: str, as_callable: bool, stage: int) -> None:
    weights = run_on_ranks(2, train_with_client, kind=kind, stage=stage, as_callable=as_callable)[0]
    assert deviation(weights, run_reference(kind, 2)["weights"]) < 1e-5


def test_client_optimizer_with_offload() -> None:
    weights = run_on_ranks(
        2,
        train_with_client,
        kind="GateRiemannianAdamW",
        stage=2,
        as_callable=False,
        offload_optimizer={"device": "cpu"},
    )[0]
    assert deviation(weights, run_reference("GateRiemannianAdamW", 2)["weights"]) < 1e-5


def scheduled(gate_lr_scale: float) -> dict[str, Any]:
    """On every rank: DeepSpeed's WarmupLR overwrites every group's lr; the routers' scale must hold."""
    import deepspeed

    model = Stack(SHAPES)
    config = engine_config(2, "GateRiemannianSGD")
    config["optimizer"]["params"].update(gate_lr_scale=gate_lr_scale, weight_decay=0.0, momentum=0.0)
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=one_group(model), config=config)
    before = full_weights(engine.module)
    for micro in batches(6, 1, dist.get_world_size()):
        engine.backward(engine(*micro[0][dist.get_rank()]))
        engine.step()
    after = full_weights(engine.module)
    lrs = [group["lr"] for group in engine.optimizer.param_groups]
    engine.destroy()
    return {"moved": {n: (after[n] - before[n]).abs().max().item() for n in after}, "lrs": lrs}


def test_gate_lr_scale_under_zero_with_a_deepspeed_scheduler() -> None:
    plain, scaled = (run_on_ranks(2, scheduled, gate_lr_scale=scale)[0] for scale in (1.0, 1e-3))
    assert scaled["lrs"] == [pytest.approx(1e-2)] * 2
    routers = [name for name in plain["moved"] if "router" in name]
    assert routers
    for name in routers:
        assert scaled["moved"][name] < 1e-2 * plain["moved"][name]
    assert scaled["moved"]["layers.0.lora_A"] == pytest.approx(plain["moved"]["layers.0.lora_A"], rel=0.2)


def step_with_closure(stage: int) -> str:
    import deepspeed

    model = Stack(SHAPES)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=one_group(model), config=engine_config(stage, "GateRiemannianAdamW")
    )
    engine.backward(engine(*batches(1, 1, 1)[0][0][0]))
    try:
        engine.basic_optimizer.step(closure=lambda: None)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_closure_under_zero_is_refused_on_every_rank(stage: int) -> None:
    for message in run_on_ranks(2, step_with_closure, stage=stage):
        assert "without a closure" in message


def initialize(config: dict[str, Any], tagged: bool) -> str:
    import copy

    import deepspeed

    import ds_moelora  # noqa: F401

    model = Stack(SHAPES) if tagged else copy.deepcopy(Stack(SHAPES))
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=one_group(model), config=config)
    except ValueError as error:
        return str(error)
    engine.destroy()
    return "no error"


def test_bad_configs_are_refused_on_every_rank() -> None:
    config = engine_config(2, "GateRiemannianAdamW")
    for message in run_on_ranks(2, initialize, config=config, tagged=False):
        assert "tag_lora_pairs(model)" in message
    for option, value in (("damping", float("nan")), ("gate_scaling", "quadratic")):
        config = engine_config(2, "GateRiemannianAdamW")
        config["optimizer"]["params"][option] = value
        for message in run_on_ranks(2, initialize, config=config, tagged=True):
            assert f"{option}={value!r}" in message


def test_unknown_attribute_names_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """If DeepSpeed renames what `optimizer.sharding.zero` reads, the error says which versions were tested."""
    model = Stack(SHAPES)
    optimizer = GateRiemannianAdamW(p for p in model.parameters() if p.requires_grad)
    model.layers[0].lora_A._z3_optimizer = object()
    with pytest.raises(ValueError, match=r"DeepSpeed here: .*; tested: "):
        optimizer.step()
