"""What can be checked from files and settings alone, before a rank waits for another or a model is loaded."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ds_moelora.expert_parallel.spec import check_ep_size
from ds_moelora.optimizer.guard import OURS
from ds_moelora.pairs import GATE_SCALINGS
from launch.checkpoint.resume import check_output_dir
from launch.checks.arguments import Arguments, non_defaults
from launch.checks.bounds import check_bounds
from launch.checks.deepspeed_config import check_deepspeed_config
from launch.checks.effects import check_effects, check_task
from launch.checks.errors import UserError, process_rank, say
from launch.checks.extensions import remove_abandoned_locks
from launch.checks.trusted import check_trusted
from launch.data.answering import wants_answers
from launch.data.data_checks import check_data

# The keys that transformers fills in; "auto" anywhere else would reach the optimizer as a string.
AUTO_KEYS = ("lr", "betas", "eps", "weight_decay")
FILLED_IN = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_epsilon": "eps",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
}
LOST_RANK_SECONDS = (6, 3600)  # keepalive counts in whole seconds, and takes six of its intervals


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The DeepSpeed config as a dict.

    Raises:
        UserError: no such file, not JSON (with line and column), or not an object.
    """
    file = Path(path)
    if not os.path.isfile(file):  # not file.is_file(), which raises for a name that is too long for a path
        near = sorted(str(p) for p in file.parent.glob("*.json")) if file.parent.is_dir() else []
        found = f" That folder has: {', '.join(near)}." if near else ""
        raise UserError(f"--deepspeed {path}: there is no such file (working directory: {Path.cwd()}).{found}")
    try:
        config = json.loads(file.read_text())
    except UnicodeDecodeError as error:
        raise UserError(f"--deepspeed {path} is not text: {error}.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"--deepspeed {path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise UserError(f"--deepspeed {path} is nested too deeply: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path} holds a JSON {type(config).__name__}; a config is an object {{...}}.")
    return config


def check_optimizer(arguments: Arguments) -> str:
    """Makes sure that the optimizer that will run is one that was asked for.

    Returns:
        The optimizer's name: the `type` in the DeepSpeed config, or `--optim`.

    Raises:
        UserError: no DeepSpeed optimizer block and no `--optim` (transformers would quietly run its AdamW), both of
            them (DeepSpeed's would quietly win), an unknown type, or parameters the optimizer does not take.
    """
    path, optim = arguments.training.deepspeed, arguments.training.optim
    if path is None:
        if optim is None:
            raise UserError(
                "no --deepspeed config was given, so transformers would train with its own AdamW. Pass --deepspeed "
                "configs/zero2.json for GateRiemannianAdamW, or choose an optimizer yourself with --optim."
            )
        return optim
    config = read_deepspeed_config(path)
    block = config.get("optimizer")
    if block is None:
        if optim is None:
            raise UserError(
                f'{path} has no "optimizer" block, so transformers would train with its own AdamW. Add '
                '"optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": "auto"}}, or pass --optim to accept '
                "another one."
            )
        check_deepspeed_config(path, config, arguments)
        return optim
    if optim is not None:
        raise UserError(f'--optim {optim} has no effect: {path} has an "optimizer" block. Remove one of the two.')
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise UserError(f'{path}: "optimizer" must be an object with a "type", such as "GateRiemannianAdamW".')
    _check_optimizer_block(path, block)
    check_deepspeed_config(path, config, arguments)
    _name_idle_flags(path, config, arguments.training)
    return block["type"]


def _name_idle_flags(path: str, config: dict[str, Any], training: Any) -> None:
    """Flags whose place in the DeepSpeed config is missing, or taken by something else, do nothing."""
    params = config["optimizer"].get("params", {})
    idle = {flag: f'has no optimizer.params "{key}"' for flag, key in FILLED_IN.items() if key not in params}
    if "gradient_clipping" not in config:
        idle["max_grad_norm"] = 'has no "gradient_clipping"'
    if "scheduler" in config:
        idle |= dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), "has a scheduler of its own")
    given = non_defaults(training)
    for flag in idle.keys() & given.keys():
        say(f"--{flag} {given[flag]} is not used: {path} {idle[flag]}.")


def _check_optimizer_block(path: str, block: dict[str, Any]) -> None:
    name, params = block["type"], block.get("params", {})
    optimizer_class = getattr(torch.optim, name, None)
    if name.lower() not in DEEPSPEED_OPTIMIZERS and not _is_optimizer(optimizer_class):
        torch_names = [n for n in dir(torch.optim) if _is_optimizer(getattr(torch.optim, n)) and n != "Optimizer"]
        names = {n.lower(): n for n in [*DEEPSPEED_OPTIMIZERS, *torch_names, *OURS]}
        near = [names[n] for n in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"{', '.join(OURS)} come with ds_moelora."
        raise UserError(f'{path}: there is no optimizer "{name}". {hint}')
    if not isinstance(params, dict):
        raise UserError(f'{path}: "optimizer.params" must be an object.')
    for key, value in params.items():
        if value == "auto" and key not in AUTO_KEYS:
            raise UserError(
                f'{path}: optimizer.params.{key} is "auto", which transformers fills in for {", ".join(AUTO_KEYS)} '
                "only. Write a value, or remove the key for the optimizer's default."
            )
    if name in OURS:
        _check_our_params(path, name, params, optimizer_class)


def _check_our_params(path: str, name: str, params: dict[str, Any], optimizer_class: Callable[..., Any]) -> None:
    accepted = [p for p in inspect.signature(optimizer_class).parameters if p not in ("self", "params")]
    for key in params:
        if key not in accepted:
            raise UserError(f"{path}: {name} has no parameter {key!r}; it takes: {', '.join(accepted)}.")
    gate_scaling = params.get("gate_scaling", "sqrt")
    if gate_scaling not in GATE_SCALINGS:
        raise UserError(f"{path}: gate_scaling {gate_scaling!r} is unknown; choose one of: {', '.join(GATE_SCALINGS)}.")
    for key in ("damping", "gate_lr_scale", "aux_lr"):
        value = params.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UserError(f"{path}: {key} is {value!r}; it must be a finite number that is not negative.")


def _is_optimizer(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)


def check_numbers(arguments: Arguments) -> None:
    """Bounds of the run's own numbers.

    Raises:
        UserError: a value outside its bounds, or two settings that exclude each other.
    """
    run = arguments.run
    for name in ("max_train_samples", "max_eval_samples"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1.")
    if run.stop_after_nan_steps < 0:
        raise UserError(f"--stop_after_nan_steps {run.stop_after_nan_steps} must be at least 1, or 0 for never.")
    low, high = LOST_RANK_SECONDS
    if not low <= run.lost_rank_seconds <= high:
        raise UserError(f"--lost_rank_seconds {run.lost_rank_seconds} must be from {low} to {high}.")
    folder = Path(run.status_file or "").absolute().parent
    if run.status_file is not None and not os.access(folder, os.W_OK):
        raise UserError(f"--status_file {run.status_file}: {folder} is not there, or cannot be written to.")
    if not 0.0 <= run.eval_fraction < 1.0:
        raise UserError(f"--eval_fraction {run.eval_fraction} must be at least 0 and below 1.")
    if run.eval_fraction and run.eval_dataset_name:
        raise UserError("--eval_fraction and --eval_dataset_name both name an evaluation set; keep one.")
    has_eval = bool(run.eval_fraction or run.eval_dataset_name or arguments.demo)
    if (
        str(getattr(arguments.training.eval_strategy, "value", arguments.training.eval_strategy)) != "no"
        and not has_eval
    ):
        raise UserError("--eval_strategy needs an evaluation set: --eval_dataset_name, or --eval_fraction.")
    if wants_answers(arguments.scoring, run.task) and not has_eval:
        raise UserError("--score answers (or --answer_pattern) needs --eval_dataset_name, or --eval_fraction.")


def check_loss(arguments: Arguments) -> None:
    """Refuses losses that are not the model's own, of which the routers' load-balancing loss is a part.

    Raises:
        UserError: label smoothing, or TRL's "dft" loss.
    """
    training = arguments.training
    if training.label_smoothing_factor:
        raise UserError(
            f"--label_smoothing_factor {training.label_smoothing_factor} is not supported: it replaces the model's "
            "loss, and the routers' load-balancing loss with it. Use 0."
        )
    if getattr(training, "loss_type", "nll") == "dft":
        raise UserError("--loss_type dft is not supported: it leaves out the routers' load-balancing loss. Use nll.")


def check_expert_parallel(arguments: Arguments) -> None:
    """Finds settings with which the experts cannot be spread over the ranks.

    Raises:
        UserError: a size that does not fit, no DeepSpeed config, or ZeRO stage 3.
    """
    adapter, path = arguments.adapter, arguments.training.deepspeed
    if adapter.ep_size == 1:
        return
    if adapter.ep_size < 1:
        raise UserError(f"--ep_size {adapter.ep_size} must be at least 1.")
    try:
        check_ep_size(adapter.ep_size, adapter.num_experts, process_rank()[1])
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if path is None:
        raise UserError(f"--ep_size {adapter.ep_size} needs DeepSpeed: pass --deepspeed configs/zero2_ep.json.")
    if _zero_stage(path) == 3:
        raise UserError(
            f"--ep_size {adapter.ep_size} with {path}: ZeRO stage 3 shards the experts over all ranks already. Use "
            "--ep_size 1, or a config of stage 1 or 2 such as configs/zero2_ep.json."
        )


def _zero_stage(path: str | None) -> int:
    return 0 if path is None else read_deepspeed_config(path).get("zero_optimization", {}).get("stage", 0)


def preflight(arguments: Arguments) -> str:
    """All checks before torch.distributed opens; returns the optimizer's name."""
    remove_abandoned_locks()
    check_numbers(arguments)
    check_bounds(arguments.training)
    check_task(arguments.run)
    check_data(arguments)
    check_loss(arguments)
    check_effects(arguments)
    name = check_optimizer(arguments)
    check_expert_parallel(arguments)
    check_output_dir(arguments)
    check_trusted(arguments)
    return name
