"""DeepSpeed configs as other projects document or ship them, with the optimizer named: accepted, and they train.

Written after Hugging Face's DeepSpeed page and the JSON files of LLaMA-Factory, axolotl and ms-swift.
"""

from __future__ import annotations

import copy
import json
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_moelora.optimizer.guard import OURS
from launch.checkpoint.saving import say_optimizer
from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.deepspeed_config import check_optimizer
from launch.demo import defaults
from tests.support.mixture import SHAPES, Stack, batches
from tests.support.ranks import run_on_ranks
from tests.support.training import one_group

AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SIZES: dict[str, Any] = dict.fromkeys(AUTO, "auto")
LOSS_SCALE = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
FP16_AUTO = {"fp16": {"enabled": "auto", "initial_scale_power": 16, **LOSS_SCALE}}
BOTH_AUTO = {**FP16_AUTO, "bf16": {"enabled": "auto"}}
CPU = {"device": "cpu", "pin_memory": True}
NOWHERE = {"device": "none", "pin_memory": True}
GATHER = {"stage3_gather_16bit_weights_on_model_save": True}
STAGE_3_AUTO = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
STAGE_3 = {
    "stage": 3,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    **STAGE_3_AUTO,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    **GATHER,
}
HF_2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
FACTORY_2 = {**HF_2, "allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8, "overlap_comm": False}
FACTORY_2["round_robin_gradients"] = True
WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}
WARMUP_DECAY = {"type": "WarmupDecayLR", "params": {**WARMUP["params"], "total_num_steps": "auto"}}
QUIET = {"steps_per_print": 2000, "wall_clock_breakdown": False}
AXOLOTL = {
    **SIZES,
    "bf16": {"enabled": True},
    "fp16": {"enabled": "auto", "auto_cast": False, "initial_scale_power": 32, **LOSS_SCALE},
    "wall_clock_breakdown": False,
}
UNTESTED = {"zero_allow_untested_optimizer": True}
ZEROPP_OFF = {"zero_quantized_weights": False, "zero_quantized_gradients": False}


def zero(common: dict[str, Any], stage: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**common, "zero_optimization": {**stage, **more}}


HF = {**SIZES, **BOTH_AUTO, **QUIET}
FACTORY = {**SIZES, **BOTH_AUTO, **UNTESTED}
SWIFT = {**SIZES, **BOTH_AUTO, **QUIET}
CONFIGS: dict[str, dict[str, Any]] = {
    "HF ZeRO-1": zero(HF, {"stage": 1}),
    "HF ZeRO-2": {**zero(HF, HF_2, offload_optimizer=CPU), "scheduler": WARMUP},
    "HF ZeRO-2, fp16 alone": zero({**SIZES, **FP16_AUTO, **QUIET}, HF_2),
    "HF ZeRO-3": {
        **zero(HF, STAGE_3, overlap_comm=True, offload_optimizer=CPU, offload_param=CPU),
        "scheduler": WARMUP_DECAY,
    },
    "LLaMA-Factory z0": zero(FACTORY, {**FACTORY_2, "stage": 0}),
    "LLaMA-Factory z2": zero(FACTORY, FACTORY_2),
    "LLaMA-Factory z2 offload": zero(FACTORY, FACTORY_2, offload_optimizer=CPU),
    "LLaMA-Factory z3": zero(FACTORY, STAGE_3, overlap_comm=False),
    "LLaMA-Factory z3 offload": zero(FACTORY, STAGE_3, overlap_comm=False, offload_optimizer=CPU, offload_param=CPU),
    "axolotl zero1": zero(AXOLOTL, {"stage": 1, "overlap_comm": True}),
    "axolotl zero2": zero(
        AXOLOTL, {"stage": 2, "contiguous_gradients": True, "overlap_comm": True}, offload_optimizer={"device": "cpu"}
    ),
    "axolotl zero3": zero(
        AXOLOTL,
        {**STAGE_3, "sub_group_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
        overlap_comm=True,
    ),
    "ms-swift zero0": zero(SWIFT, {**HF_2, "stage": 0, "overlap_comm": False}),
    "ms-swift zero1": zero(SWIFT, {**HF_2, "stage": 1, "overlap_comm": False}, offload_optimizer=NOWHERE),
    "ms-swift zero2": zero(SWIFT, HF_2, overlap_comm=False, offload_optimizer=NOWHERE),
    "ms-swift zero2 offload": zero(SWIFT, HF_2, overlap_comm=False, offload_optimizer=CPU),
    "ms-swift zero3": zero(
        SWIFT, STAGE_3, overlap_comm=False, offload_optimizer=NOWHERE, offload_param=NOWHERE, **ZEROPP_OFF
    ),
    "ms-swift zero3 offload": zero(
        SWIFT, STAGE_3, overlap_comm=False, offload_optimizer=CPU, offload_param=CPU, **ZEROPP_OFF
    ),
}
PARAMS = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")


def named(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The config with an optimizer, which is the one word that a user writes."""
    params = PARAMS if kind.endswith("AdamW") else dict.fromkeys(("lr", "weight_decay"), "auto")
    return {**copy.deepcopy(config), "optimizer": {"type": kind, "params": dict(params)}}


def wants_bf16(config: dict[str, Any]) -> bool:
    return config.get("bf16", {}).get("enabled") is True


def arguments_for(config: dict[str, Any], folder: Path, *flags: str) -> Arguments:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return parse_arguments(["--deepspeed", str(path), "--output_dir", str(folder), *flags], defaults.DEFAULTS)


@pytest.mark.parametrize(("name", "kind"), zip(CONFIGS, cycle([*OURS, "AdamW"])))
def test_the_launcher_accepts_it(name: str, kind: str, tmp_path: Path) -> None:
    flags = ["--bf16"] if wants_bf16(CONFIGS[name]) else []
    assert check_optimizer(arguments_for(named(CONFIGS[name], kind), tmp_path, *flags)) == kind


def test_the_class_that_deepspeed_has_for_a_name_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class FusedAdam(torch.optim.AdamW):
        pass

    config = SimpleNamespace(optimizer_name="adamw")  # as DeepSpeed reads it
    for kind, said in ((FusedAdam, f"Optimizer: adamw is {__name__}.FusedAdam here.\n"), (torch.optim.AdamW, "")):
        optimizer = kind([torch.zeros(1, requires_grad=True)])
        say_optimizer(SimpleNamespace(basic_optimizer=optimizer, _config=config))
        assert capsys.readouterr().out == said


def train_with(configs: dict[str, dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """On every rank: the optimizer that runs, and whether one step moved the weights to finite values."""
    import deepspeed
    import torch.distributed as dist
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    import ds_moelora  # noqa: F401

    found = {}
    for name, config in configs.items():
        options = {"bf16": wants_bf16(config), "use_cpu": True, "report_to": [], "output_dir": "unused"}
        arguments = TrainingArguments(per_device_train_batch_size=6, learning_rate=0.1, warmup_steps=2, **options)
        filled = HfTrainerDeepSpeedConfig(copy.deepcopy(config))
        filled.trainer_config_process(arguments)
        model = Stack(SHAPES)
        model.config = SimpleNamespace(hidden_size=11)  # bucket sizes are derived from it
        filled.trainer_config_finalize(arguments, model, num_training_steps=10)
        engine, *_ = deepspeed.initialize(model=model, model_parameters=one_group(model), config=filled.config)
        before = deepspeed.utils.safe_get_full_fp32_param(model.head.weight)
        before = (model.head.weight if before is None else before).detach().clone()
        dtype = next(engine.module.parameters()).dtype
        x, target = (t.to(dtype) for t in batches(1, 1, dist.get_world_size())[0][0][dist.get_rank()])
        for _ in range(3):  # WarmupLR begins with a learning rate of 0
            engine.backward(engine(x, target))
            engine.step()
        after = deepspeed.utils.safe_get_full_fp32_param(model.head.weight)
        after = (model.head.weight if after is None else after).detach()
        moved = bool((before != after).any() and after.isfinite().all())
        found[name] = (type(engine.basic_optimizer).__name__, moved)
        engine.destroy()
    return found


@pytest.mark.dist
def test_it_trains() -> None:
    kinds = {name: OURS[i % len(OURS)] for i, name in enumerate(CONFIGS)}
    configs = {name: named(CONFIGS[name], kind) for name, kind in kinds.items()}
    for found in run_on_ranks(2, train_with, configs=configs):
        assert found == {name: (kind, True) for name, kind in kinds.items()}
