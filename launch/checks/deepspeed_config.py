"""The DeepSpeed config and the optimizer in it, judged before any rank waits for another.

DeepSpeed parses its config when the engine is built, with the model loaded and the ranks connected; what it does not
parse (the parameters of optimizers and schedulers) fails later still. Here the config is filled in and parsed as it
will be then, and the optimizer and the scheduler are built once on a pair of factors of a few elements.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.runtime.config as deepspeed_config
import torch
from deepspeed.runtime import lr_schedules
from pydantic import ValidationError
from torch import nn
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from ds_moelora.optimizer.defaults import OTHERS, default_learning_rate
from ds_moelora.optimizer.guard import OURS
from ds_moelora.pairs import LoraPair, tag_pair
from ds_moelora.redaction import remember
from launch.checks.arguments import Arguments, non_defaults
from launch.checks.errors import UserError, process_rank, say

SECTIONS = (
    *("zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "data_types", "checkpoint", "elasticity", "aio"),
    *("activation_checkpointing", "flops_profiler", "comms_logger", "autotuning", "compile", "torch_autocast"),
    *("tensorboard", "wandb", "csv_monitor", "hybrid_engine", "zero_optimization.offload_optimizer"),
    *("zero_optimization.offload_param", "optimizer.params", "scheduler.params"),
)
SWITCHES = (
    "wall_clock_breakdown",
    "memory_breakdown",
    "prescale_gradients",
    "dump_state",
    "zero_allow_untested_optimizer",
)
# Filled in when model and number of steps are known; DeepSpeed's own defaults stand in for them here.
FILLED_LATER = {
    "zero_optimization": ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    "scheduler.params": ("total_num_steps", "warmup_num_steps"),
}
# The optimizer's parameters that transformers fills in, from these flags; torch.optim.AdamW and DeepSpeed's own
# optimizers share them.
FILLED_IN = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_epsilon": "eps",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
}
COMMON_PARAMS = tuple(dict.fromkeys(FILLED_IN.values()))
# What DeepSpeed's "adam" and "adamw" take besides.
ADAM_PARAMS = ("bias_correction", "amsgrad", "torch_adam", "adam_w_mode", "fp32_optimizer_states")


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The DeepSpeed config as a dict."""
    file = Path(path)
    if not os.path.isfile(file):  # not file.is_file(), which raises for a name that is too long for a path
        near = sorted(str(p) for p in file.parent.glob("*.json")) if file.parent.is_dir() else []
        found = f" That folder has: {', '.join(near)}." if near else ""
        raise UserError(f"--deepspeed {path}: there is no such file (working directory: {Path.cwd()}).{found}")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: also what is not text
        raise UserError(f"--deepspeed {path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path} holds a JSON {type(config).__name__}; a config is an object {{...}}.")
    remember(config)
    return config


def check_optimizer(arguments: Arguments) -> str:
    """Makes sure that the optimizer that will run was asked for; returns `type` in the DeepSpeed config, or `--optim`.

    Without either, transformers would quietly run its AdamW; with both, DeepSpeed's would quietly win.
    """
    path, optim = arguments.training.deepspeed, arguments.training.optim
    if path is None:
        if optim is None:
            raise UserError(
                "no --deepspeed config was given, so transformers would train with its own AdamW. Pass --deepspeed "
                "configs/zero2.json for GateRiemannianAdamW, or choose an optimizer yourself with --optim."
            )
        settle_rate(arguments.training, optim, {})
        return optim
    given = non_defaults(arguments.training)
    config = read_deepspeed_config(path)
    _check_shapes(path, config)
    block = config.get("optimizer")
    if block is None:
        if optim is None:
            raise UserError(
                f'{path} has no "optimizer" block, so transformers would train with its own AdamW. Add '
                '"optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": "auto"}}, or pass --optim to accept '
                "another one."
            )
        settle_rate(arguments.training, optim, {})
        _check_config(path, config, arguments)
        return optim
    if optim is not None:
        raise UserError(f'--optim {optim} has no effect: {path} has an "optimizer" block. Remove one of the two.')
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise UserError(f'{path}: "optimizer" must be an object with a "type", such as "GateRiemannianAdamW".')
    _check_block(path, block["type"], block.get("params", {}))
    settle_rate(arguments.training, block["type"], block.get("params", {}))
    _check_config(path, config, arguments)
    _name_idle_flags(path, config, given)
    return block["type"]


def settle_rate(training: Any, optimizer: str, params: dict[str, Any]) -> None:
    """Where no flag gives the learning rate: the config's own, or the optimizer's default."""
    if training.learning_rate is not None:
        return
    rate = params.get("lr", "auto")
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    training.learning_rate = rate if is_number else default_learning_rate(optimizer)
    if default_learning_rate(optimizer) == OTHERS and not is_number:
        say(f"--learning_rate is {OTHERS:g}: no rate of {optimizer} has been tried here; give yours.")


def _name_idle_flags(path: str, config: dict[str, Any], given: dict[str, Any]) -> None:
    """Flags whose place in the DeepSpeed config is missing, or taken by something else, do nothing."""
    params = config["optimizer"].get("params", {})
    idle = {flag: f'has no optimizer.params "{key}"' for flag, key in FILLED_IN.items() if key not in params}
    if "gradient_clipping" not in config:
        idle["max_grad_norm"] = 'has no "gradient_clipping"'
    if "scheduler" in config:
        idle |= dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), "has a scheduler of its own")
    for flag in idle.keys() & given.keys():
        say(f"--{flag} {given[flag]} is not used: {path} {idle[flag]}.")


def _check_block(path: str, name: str, params: dict[str, Any]) -> None:
    """Refuses a type that neither DeepSpeed nor torch.optim, where ours are registered, has, and unknown parameters."""
    known = [n for n in dir(torch.optim) if _is_optimizer(getattr(torch.optim, n)) and n != "Optimizer"]
    if name.lower() in deepspeed_config.DEEPSPEED_OPTIMIZERS:
        accepted = [*COMMON_PARAMS, *ADAM_PARAMS] if name.lower() in ("adam", "adamw") else [*params]
    elif name in known:
        accepted = [n for n in inspect.signature(getattr(torch.optim, name)).parameters if n != "params"]
    else:
        names = {n.lower(): n for n in [*deepspeed_config.DEEPSPEED_OPTIMIZERS, *known]}
        near = [names[n] for n in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"{', '.join(OURS)} come with ds_moelora."
        raise UserError(f'{path}: there is no optimizer "{name}". {hint}')
    for key, value in params.items():
        if key not in accepted:
            raise UserError(f"{path}: {name} has no parameter {key!r}; it takes: {', '.join(accepted)}.")
        if value == "auto" and key not in COMMON_PARAMS:
            raise UserError(
                f'{path}: optimizer.params.{key} is "auto", which transformers fills in for {", ".join(COMMON_PARAMS)} '
                "only. Write a value, or remove the key for the optimizer's default."
            )


def _is_optimizer(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)


def _check_config(path: str, config: dict[str, Any], arguments: Arguments) -> None:
    """Finds what DeepSpeed, or its optimizer or scheduler, would not take."""
    filled = _filled(path, config, arguments.training)
    _attempt(path, lambda: deepspeed_config.DeepSpeedConfig(filled))
    dtype = config.get("data_types", {}).get("grad_accum_dtype")
    if dtype is not None:
        _attempt(f"{path}: data_types.grad_accum_dtype {dtype!r}", lambda: deepspeed_config.DtypeEnum(dtype))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    if "optimizer" in filled:
        optimizer = _attempt(f"{path}: optimizer {filled['optimizer']}", lambda: _try_optimizer(**filled["optimizer"]))
    if "scheduler" in filled:
        _attempt(f"{path}: scheduler {filled['scheduler']}", lambda: _try_scheduler(optimizer, **filled["scheduler"]))


def _check_shapes(path: str, config: dict[str, Any]) -> None:
    """What DeepSpeed reads without looking at it, or leaves out in silence."""
    known = {value for name, value in vars(deepspeed_config).items() if name.isupper() and isinstance(value, str)}
    for key in config.keys() - known - set(SECTIONS):
        near = difflib.get_close_matches(key, [k for k in (*known, *SECTIONS) if len(k) > 4], n=1, cutoff=0.85)
        if near:
            raise UserError(f"{path}: DeepSpeed has no key {key!r} and would ignore it. Did you mean {near[0]!r}?")
    for name in SECTIONS:
        *parents, last = name.split(".")
        owner = config.get(parents[0], {}) if parents else config
        if last in owner and not isinstance(owner[last], dict):
            raise UserError(f"{path}: {name} is {owner[last]!r}; it must be an object {{...}}, or be left out.")
    for name in SWITCHES:
        if not isinstance(config.get(name, False), bool):
            raise UserError(f"{path}: {name} is {config[name]!r}; it must be true or false.")
    for name in ("steps_per_print", "gradient_predivide_factor"):
        value = config.get(name, 1)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise UserError(f"{path}: {name} is {value!r}; it must be a number above 0.")


def _filled(path: str, config: dict[str, Any], training: Any) -> dict[str, Any]:
    """The config with "auto" replaced as transformers will do it."""
    flags = SimpleNamespace(**{**vars(training), "bf16": training.wants_bf16(), "world_size": process_rank()[1]})
    made = _attempt(path, lambda: HfTrainerDeepSpeedConfig(copy.deepcopy(config)))
    _attempt(path, lambda: made.trainer_config_process(flags))
    if made.mismatches:
        disagreeing = "; ".join(text.removeprefix("- ") for text in made.mismatches)
        raise UserError(
            f'{path} and the flags disagree: {disagreeing}. Write "auto" into the DeepSpeed config, or change the flag.'
        )
    filled = made.config
    for section, names in FILLED_LATER.items():
        owner = filled
        for part in section.split("."):
            owner = owner.get(part, {})
        for name in names:
            if owner.get(name) == "auto":
                owner[name] = 1000
    # Without torch.distributed, DeepSpeed takes itself for one rank; transformers has just compared the product.
    filled.pop("train_batch_size", None)
    filled["train_micro_batch_size_per_gpu"] = training.per_device_train_batch_size
    filled["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    return filled


def _try_optimizer(type: str, params: dict[str, Any] | None = None, **_: Any) -> torch.optim.Optimizer:
    """An optimizer of that name, or a stand-in for DeepSpeed's own ones that checks alike, on one pair of factors."""
    factors = [nn.Parameter(torch.zeros(1, 2, 2)) for _ in range(2)]
    tag_pair(LoraPair("the config's optimizer", num_experts=1, rank=2), *factors)
    given = params or {}
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite")
    if type.lower() not in deepspeed_config.DEEPSPEED_OPTIMIZERS:
        return getattr(torch.optim, type)(factors, **given)
    return torch.optim.AdamW(factors, **{name: given[name] for name in COMMON_PARAMS if name in given})


def _try_scheduler(
    optimizer: torch.optim.Optimizer,
    type: str | None = None,
    params: dict[str, Any] | None = None,
) -> None:
    """A scheduler of that name, found as DeepSpeed finds it."""
    known = lr_schedules.VALID_LR_SCHEDULES
    found = getattr(lr_schedules, str(type), None) or getattr(torch.optim.lr_scheduler, str(type), None)
    if not isinstance(found, Callable):  # type: ignore[arg-type]
        raise ValueError(f"there is no scheduler {type!r}; DeepSpeed has {', '.join(known)}, torch others")
    found(optimizer, **(params or {}))


def _attempt(what: str, call: Callable[[], Any]) -> Any:
    """`call()`; whatever it raises is the verdict of DeepSpeed, transformers or torch on the config."""
    try:
        return call()
    except Exception as error:
        raise UserError(f"{what} is refused: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
        return f"{error.title}: {'; '.join(found)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
