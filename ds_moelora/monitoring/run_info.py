"""What a run is, for TensorBoard: hyperparameters for its HParams tab, the whole configuration as text."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard.summary import hparams

from ..checkpoint.record import plain
from ..optimizer.base import GateRiemannian
from ..redaction import redact, redact_words

ADAPTER_FIELDS = (
    *("r", "num_experts", "top_k", "lora_alpha", "scaling", "lora_dropout", "init_lora_weights"),
    *("router_aux_loss_coef", "router_z_loss_coef", "router_temperature", "router_jitter", "top_p"),
    *("shared_expert", "shared_A", "ep_size", "ep_dispatch", "expert_compute"),
)
OPTIMIZER_FIELDS = ("lr", "betas", "momentum", "eps", "weight_decay")
PAIR_FIELDS = ("damping", "gate_scaling", "scale_input_grad", "gate_lr_scale", "include_scaling")
PACKAGES = ("ds_moelora", "torch", "deepspeed", "transformers", "peft", "accelerate")
METRICS = ("train/loss", "eval/loss", "eval/accuracy", "moe/load_max_over_ideal", "perf/tokens_per_second")

FIRST = ("learning_rate", "optimizer", "num_experts", "top_k", "r", "per_device_train_batch_size", "train_batch_size")

Value = int | float | bool | str


def hyperparameters(model: nn.Module, optimizer: Any, extra: dict[str, Any]) -> dict[str, Value]:
    """Name -> number, boolean or text: the active adapter's, the optimizer's, and `extra`."""
    found: dict[str, Any] = dict.fromkeys(FIRST)  # the table's columns are in this order
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) else None
    for name in ADAPTER_FIELDS:
        if hasattr(config, name):
            found[name] = getattr(config, name)
    basic = basic_optimizer(optimizer)
    found["optimizer"] = type(basic).__name__
    ours = isinstance(basic, GateRiemannian)
    for name in OPTIMIZER_FIELDS + (PAIR_FIELDS if ours else ()):
        if name in getattr(basic, "defaults", {}):
            found[name] = basic.defaults[name]
    found |= extra
    known = {name: value for name, value in redact(found).items() if value is not None}
    return {name: value if isinstance(value, Value) else str(value) for name, value in known.items()}


def basic_optimizer(optimizer_or_engine: Any) -> Any:
    """The optimizer that steps, under the wrappers of DeepSpeed and accelerate."""
    inner = getattr(optimizer_or_engine, "basic_optimizer", None)
    found = optimizer_or_engine if inner is None else inner
    while getattr(found, "optimizer", None) is not None:
        found = found.optimizer
    return found


def configuration(model: nn.Module, engine: Any = None) -> dict[str, Any]:
    """Command, versions, adapters and DeepSpeed config of the running process, without secrets."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    given = engine.config if engine is not None else None  # a dict, or the path of a file
    ds_config = json.loads(Path(given).read_text()) if isinstance(given, str | Path) else given
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    found = {"command": redact_words(sys.argv), "versions": versions, "adapters": adapters, "deepspeed": ds_config}
    return redact(found)


def write_run_info(writer: Any, model: nn.Module, optimizer: Any, engine: Any, extra: dict[str, Any]) -> None:
    """Both into the run of a `SummaryWriter`, whose scalars the HParams tab then shows beside the hyperparameters.

    Args:
        engine: DeepSpeed's; None without it.
    """
    extra = {**extra, "zero_stage": None if engine is None else engine.zero_optimization_stage()}
    for summary in hparams(hyperparameters(model, optimizer, extra), dict.fromkeys(METRICS, 0.0)):
        writer.file_writer.add_summary(summary)
    text = json.dumps(plain(configuration(model, engine)), indent=2)
    writer.add_text("run/configuration", "\n".join("    " + line for line in text.splitlines()))  # Markdown's verbatim
    writer.flush()
