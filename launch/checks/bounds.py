"""Bounds of numbers and names. transformers takes most as they come, to fail, or train nonsense, much later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError

Rule = tuple[Callable[[Any], bool], str]
AT_LEAST_1: Rule = (lambda v: v >= 1, "at least 1")
ABOVE_0: Rule = (lambda v: v > 0, "above 0")
NOT_NEGATIVE: Rule = (lambda v: v >= 0, "at least 0")
BELOW_1: Rule = (lambda v: 0 <= v < 1, "at least 0 and below 1")
RULES: dict[str, Rule] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_length": AT_LEAST_1,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "save_steps": ABOVE_0,
    "logging_steps": ABOVE_0,
    "eval_steps": ABOVE_0,
    "seed": (lambda v: 0 <= v < 2**32, "at least 0 and below 2^32"),
    "data_seed": (lambda v: 0 <= v < 2**32, "at least 0 and below 2^32"),
    "dataloader_num_workers": NOT_NEGATIVE,
    "save_total_limit": AT_LEAST_1,
    "ddp_timeout": ABOVE_0,
}
RUN_RULES: dict[str, Rule] = {
    "max_train_samples": AT_LEAST_1,
    "max_eval_samples": AT_LEAST_1,
    "eval_fraction": BELOW_1,
    "stop_after_nan_steps": (lambda v: v >= 0, "at least 1, or 0 for never"),
    # Keepalive counts in whole seconds, and takes six of its intervals.
    "lost_rank_seconds": (lambda v: 6 <= v <= 3600, "from 6 to 3600"),
}
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
CHOICES = {
    "lr_scheduler_type": SchedulerType,
    "save_strategy": SaveStrategy,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "optim": OptimizerNames,
}


def check_bounds(arguments: Arguments) -> None:
    """Checks numbers, names and places among the flags."""
    training, status_file = arguments.training, arguments.run.status_file
    _check_numbers(arguments.run, RUN_RULES)
    _check_numbers(training, RULES)
    if status_file is not None and not os.access(folder := Path(status_file).absolute().parent, os.W_OK):
        raise UserError(f"--status_file {status_file}: {folder} is not there, or cannot be written to.")
    if training.max_steps <= 0 and not 0 < training.num_train_epochs < math.inf:
        raise UserError(f"--num_train_epochs {training.num_train_epochs} must be above 0, or --max_steps be given.")
    for name, choices in CHOICES.items():
        value, known = getattr(training, name), [choice.value for choice in choices]
        if value is not None and getattr(value, "value", value) not in known:
            raise UserError(f"--{name} {value} is unknown; choose one of: {', '.join(known)}.")
    for name in ("accelerator_config", "lr_scheduler_kwargs", *CHECKPOINTING):
        _check_object(name, getattr(training, name, None))
    _check_reports(training.report_to)


def _check_numbers(flags: Any, rules: dict[str, Rule]) -> None:
    for name, (holds, bound) in rules.items():
        value = getattr(flags, name, None)
        if value is not None and not (math.isfinite(value) and holds(value)):
            raise UserError(f"--{name} {value} must be {bound}.")


def _check_object(name: str, value: Any) -> None:
    """A flag that takes JSON; transformers would read it when processes wait for each other already."""
    if not isinstance(value, str) or (name == "accelerator_config" and os.path.isfile(value)):
        return
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--{name} {value} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"--{name} {value} is no JSON object {{...}}.")


def _check_reports(report_to: Any) -> None:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    for name in set(names) - {"all", "none", "flyte"}:  # flyte is there when Flyte runs the process
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to {name} is unknown; choose none or one of: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name} is not installed here; pip install it, or choose tensorboard or none.")
