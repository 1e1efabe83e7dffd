"""Another optimizer in place of the one that was asked for: refused on every rank; nobody else is concerned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_moelora import GateRiemannianAdamW, GateRiemannianSGD

from ..support.mixture import SHAPES, Stack, batches
from ..support.ranks import run_on_ranks
from ..support.training import engine_config, one_group

pytestmark = pytest.mark.dist


class Named(Stack):
    """Stack, called as transformers' Trainer calls models."""

    def __init__(self) -> None:
        super().__init__(SHAPES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x, labels)}


def trainer_with(folder: str, config: dict[str, Any], optimizer: str | None, keep: bool) -> str:
    """On every rank: trains one step with `Trainer(optimizers=...)`; the error, or what ran."""
    from transformers import Trainer, TrainingArguments

    rows = [{"x": x[0], "labels": target[0]} for micro in batches(1, 1, 8) for x, target in micro[0]]
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=copy.deepcopy(config),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = Named()
    made = {"ours": GateRiemannianAdamW, "torch": torch.optim.AdamW}[optimizer] if optimizer else None
    client = made([p for p in model.parameters() if p.requires_grad], lr=1e-3) if made else None
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(client, None))
    if not keep:
        del client
    try:
        trainer.train()
    except ValueError as error:
        return f"ValueError: {error}"
    return type(trainer.deepspeed.basic_optimizer).__name__


AUTO = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")


@pytest.mark.parametrize("keep", [True, False], ids=["kept by the user", "built in the call"])
def test_trainer_that_drops_the_optimizer(keep: bool, tmp_path: Path) -> None:
    config = {**AUTO, "zero_optimization": {"stage": 2}}
    found = run_on_ranks(2, trainer_with, folder=str(tmp_path), config=config, optimizer="ours", keep=keep)
    for message in found:
        assert message.startswith("ValueError: GateRiemannianAdamW was built for this model, but the engine runs AdamW")
        assert '"optimizer": {"type": "GateRiemannianAdamW"' in message


def test_trainer_with_the_config_and_with_others_optimizers(tmp_path: Path) -> None:
    plain = {**AUTO, "zero_optimization": {"stage": 2}}
    ours = {**plain, "optimizer": {"type": "GateRiemannianSGD", "params": {"lr": "auto"}}}
    for config, optimizer, running in ((ours, None, "GateRiemannianSGD"), (plain, "torch", "AdamW")):
        found = run_on_ranks(2, trainer_with, folder=str(tmp_path), config=config, optimizer=optimizer, keep=True)
        assert found == [running] * 2


def initialize(config: dict[str, Any], built: str | None, given: str | None, steps_before: int = 0) -> str:
    """On every rank: `deepspeed.initialize`, after an optimizer was `built` (and has stepped); `given`: as client."""
    import deepspeed

    model = Stack(SHAPES)
    params = one_group(model)[0]["params"]
    kinds = {"ours": GateRiemannianAdamW, "SGD": GateRiemannianSGD, "torch": torch.optim.AdamW}
    optimizers = {name: kinds[name](params, lr=1e-3) for name in dict.fromkeys((built, given)) if name}
    for _ in range(steps_before):
        model(*batches(1, 1, 1)[0][0][0]).backward()
        optimizers[built].step()
    for p in params:
        p.grad = None
    client = {"optimizer": optimizers[given]} if given else {"model_parameters": params}
    try:
        engine, *_ = deepspeed.initialize(model=model, config=config, **client)
    except ValueError as error:
        return f"ValueError: {error}"
    running = type(engine.basic_optimizer).__name__
    engine.destroy()
    return running


def without_optimizer(stage: int) -> dict[str, Any]:
    config = engine_config(stage, "AdamW")
    del config["optimizer"]
    return config


@pytest.mark.parametrize(
    ("config", "built", "given", "expected"),
    [
        (
            engine_config(2, "GateRiemannianAdamW"),
            None,
            "torch",
            "asks for GateRiemannianAdamW, but the engine runs",
        ),
        (engine_config(2, "GateRiemannianSGD"), None, "ours", "asks for GateRiemannianSGD, but the engine runs"),
        (engine_config(2, "AdamW"), "ours", None, "GateRiemannianAdamW was built for this model, but"),
        (without_optimizer(2), "SGD", "torch", "GateRiemannianSGD was built for this model, but the engine runs AdamW"),
    ],
)
def test_another_optimizer_is_refused(config: dict[str, Any], built: str, given: str, expected: str) -> None:
    for message in run_on_ranks(2, initialize, config=config, built=built, given=given):
        assert message.startswith("ValueError: ")
        assert expected in message


@pytest.mark.parametrize(
    ("config", "built", "given", "steps_before", "running"),
    [
        (engine_config(2, "AdamW"), None, None, 0, "AdamW"),
        (without_optimizer(2), None, "torch", 0, "AdamW"),
        (without_optimizer(2), None, "ours", 0, "GateRiemannianAdamW"),
        (engine_config(2, "GateRiemannianSGD"), None, None, 0, "GateRiemannianSGD"),
        # An optimizer that has run, and a phase with another one after it.
        (engine_config(2, "AdamW"), "ours", None, 1, "AdamW"),
    ],
)
def test_nobody_else_is_concerned(
    config: dict[str, Any], built: str, given: str, steps_before: int, running: str
) -> None:
    found = run_on_ranks(2, initialize, config=config, built=built, given=given, steps_before=steps_before)
    assert found == [running] * 2


def prepare_with_offload(force_cpu_optimizer: bool) -> str:
    """On every rank: accelerate's own loop with a client optimizer and `offload_optimizer`."""
    from unittest import mock

    import accelerate.accelerator
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    class CPUAdam(torch.optim.AdamW):
        """DeepSpeed's takes a minute to build; what accelerate does with the optimizer is the same."""

    AcceleratorState._reset_state(reset_partial_state=True)
    config = without_optimizer(2)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config["zero_force_ds_cpu_optimizer"] = force_cpu_optimizer
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model: nn.Module = Stack(SHAPES)
    optimizer = GateRiemannianAdamW([p for p in model.parameters() if p.requires_grad])
    with (
        mock.patch.object(
            accelerate.accelerator, "map_pytorch_optim_to_deepspeed", lambda given: CPUAdam(given.param_groups)
        ),
        mock.patch("deepspeed.ops.adam.DeepSpeedCPUAdam", CPUAdam),
    ):
        try:
            engine, _ = accelerator.prepare(model, optimizer)
        except ValueError as error:
            return f"ValueError: {error}"
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    running = type(engine.basic_optimizer).__name__
    engine.destroy()
    return running


def test_accelerate_that_replaces_the_optimizer() -> None:
    for message in run_on_ranks(2, prepare_with_offload, force_cpu_optimizer=True):
        assert "GateRiemannianAdamW was built for this model, but the engine runs CPUAdam" in message
        assert '"zero_force_ds_cpu_optimizer": false' in message
    assert run_on_ranks(2, prepare_with_offload, force_cpu_optimizer=False) == ["GateRiemannianAdamW"] * 2
