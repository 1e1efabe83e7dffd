"""What becomes of every flag: used, refused, or named in one line because it does nothing here.

The flags are fields of TRL's and transformers' dataclasses, many of which are for other trainers, other devices or
other ways to run. A flag that is accepted and does nothing trains something else than was asked for. The tables below
have all that are not simply used; `tests/launch/test_effects.py` has those that are, and fails for a field of a newer
version that stands in neither.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

from launch.checks.arguments import Arguments, non_defaults
from launch.checks.errors import UserError, say
from launch.checks.flags import LANGUAGE, DataArguments, RunArguments, ScoringArguments
from launch.data.answering import wants_answers

REFUSED = {
    "auto_find_batch_size": "it begins again in a process whose other ranks go on; choose a batch size",
    "batch_eval_metrics": "the launcher's metrics need all rows at once",
    "bf16_full_eval": "the evaluation would round the adapter itself, which is saved afterwards; use --bf16",
    "fp16_full_eval": "the evaluation would round the adapter itself, which is saved afterwards; use --bf16",
    "dataset_kwargs": "rows are prepared by the launcher",
    "dataset_text_field": "name the column with --text_column",
    "enable_jit_checkpoint": "the launcher saves a checkpoint at SIGTERM by itself",
    "eval_do_concat_batches": "the launcher's metrics need all rows at once",
    "eval_use_gather_object": "the launcher's metrics gather tensors",
    "fsdp": "sharding is ZeRO's: pass --deepspeed configs/zero3.json",
    "fsdp_config": "sharding is ZeRO's: pass --deepspeed configs/zero3.json",
    "include_for_metrics": "the launcher's metrics read predictions and labels",
    "label_smoothing_factor": "it replaces the model's loss, and the routers' load-balancing loss with it",
    "label_names": "labels are named by the launcher",
    "length_column_name": "rows have no column of lengths; they are measured",
    "liger_kernel_config": "Liger's kernels replace modules that the mixture adapts, and were not tested with it",
    "use_liger_kernel": "Liger's kernels replace modules that the mixture adapts, and were not tested with it",
    "optim_target_modules": "it is for GaLore and APOLLO, which project gradients that factors do not have",
    "parallelism_config": "tensor, context and sequence parallelism are not supported; --ep_size spreads experts",
    "prediction_loss_only": "evaluation has its metrics",
    "remove_unused_columns": "the trainers get the columns that they read",
}

UNUSED = {
    "ddp_backend": "the backend is DeepSpeed's choice for the device",
    "do_eval": "evaluation data alone decides",
    "do_predict": "launch/evaluate.py scores an adapter",
    "do_train": "this program trains",
    "use_cache": "training reads every row once",
}


def _has_evaluation(arguments: Arguments) -> bool:
    return bool(arguments.run.eval_dataset_name or arguments.run.eval_fraction or arguments.demo)


def _reports_to(name: str) -> Callable[[Arguments], bool]:
    return lambda a: name in a.training.report_to or "all" in a.training.report_to


def _is_set(*flags: str) -> Callable[[Arguments], bool]:
    return lambda a: any(bool(getattr(a.training, flag, None)) for flag in flags)


_NO_DEEPSPEED = (lambda a: a.training.deepspeed is None, "DeepSpeed, not DDP, exchanges gradients")
_EVALUATION = (_has_evaluation, "there is no evaluation data: --eval_dataset_name, or --eval_fraction")
_TRACKIO = (_reports_to("trackio"), "it needs --report_to trackio")
_WORKERS = (_is_set("dataloader_num_workers"), "it needs --dataloader_num_workers")
_HUB = (_is_set("push_to_hub"), "it needs --push_to_hub")
_SVD = (
    lambda a: a.adapter.init_lora_weights.lower() not in ("true", "false"),
    "it needs --init_lora_weights goat (or pissa, ...)",
)
# Used where the condition holds.
NEEDS: dict[str, tuple[Callable[[Arguments], bool], str]] = {
    "average_tokens_across_devices": (
        lambda a: a.run.task in LANGUAGE,
        "rows, not tokens, weigh alike in classification",
    ),
    "optim_args": (lambda a: a.training.optim is not None, "the optimizer is the DeepSpeed config's"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_steps", "eval_delay"), _EVALUATION),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKIO),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb"), _NO_DEEPSPEED),
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_static_graph"), _NO_DEEPSPEED),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), _WORKERS),
    "dataloader_multiprocessing_context": _WORKERS,
    **dict.fromkeys(("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), _HUB),
    **dict.fromkeys(("hub_revision", "hub_token"), _HUB),
    "packing_strategy": (_is_set("packing", "eval_packing"), "it needs --packing"),
    "eta": (lambda a: a.adapter.scaling == "goat", "it needs --scaling goat"),
    **dict.fromkeys(("rho", "svd_cache_dir"), _SVD),
    "ep_dispatch": (lambda a: a.adapter.ep_size > 1, "it needs --ep_size above 1"),
}

# Flags of data, and the tasks that they are for.
TASK_FLAGS = {
    "prompt_template": ("causal-lm",),
    "streaming": ("causal-lm",),
    **{f"{name}_column": LANGUAGE for name in ("instruction", "input", "output", "prompt", "completion", "messages")},
    "prompt_format": LANGUAGE,
    "completion_format": LANGUAGE,
    "text_column": ("causal-lm", "sequence-classification"),
    "text_pair_column": ("sequence-classification",),
    "text_pattern": ("sequence-classification",),
    "image_column": ("image-classification", "image-text-to-text"),
    "label_column": ("sequence-classification", "image-classification"),
    "regression": ("sequence-classification", "image-classification"),
}


def check_effects(arguments: Arguments) -> None:
    """Refuses the flags that would do harm or that contradict each other, and names those that do nothing."""
    given = non_defaults(arguments.training) | non_defaults(arguments.adapter)
    for name in given.keys() & REFUSED.keys():
        raise UserError(f"--{name} {_shown(given[name])} is not supported: {REFUSED[name]}.")
    for name, value in given.items():
        used, reason = NEEDS.get(name, (None, UNUSED.get(name)))
        if name in UNUSED or (used is not None and not used(arguments)):
            # A secret is no part of a message.
            shown = "" if "token" in name else f" {_shown(value)}"
            say(f"--{name}{shown} is not used: {reason}.")
    check_task(arguments.run)
    _check_own(arguments)
    _check_weights(arguments.run)
    if arguments.run.streaming:
        _check_streaming(arguments)
    if getattr(arguments.training, "packing", False):
        _check_packing(arguments)


def check_task(run: DataArguments) -> None:
    """Refuses flags that mean nothing to the task."""
    for name, tasks in TASK_FLAGS.items():
        default = getattr(RunArguments, name)
        if run.task not in tasks and getattr(run, name, default) != default:
            raise UserError(f"--{name} has no effect with --task {run.task}; it is for {' and '.join(tasks)}.")


def _check_own(arguments: Arguments) -> None:
    """Flags that need another one, or exclude it."""
    run, scoring, training = arguments.run, arguments.scoring, arguments.training
    if getattr(training, "loss_type", "nll") == "dft":
        raise UserError("--loss_type dft is not supported: it leaves out the routers' load-balancing loss. Use nll.")
    if run.revision != RunArguments.revision and os.path.isdir(str(run.model_name_or_path)):
        say(f"--revision {run.revision} is not used: the model is a folder.")
    if scoring.max_new_tokens != ScoringArguments.max_new_tokens and not wants_answers(scoring, run.task):
        say(f"--max_new_tokens {scoring.max_new_tokens} is not used: no answers are scored (--score answers).")
    if run.eval_dataset_split is not None and run.eval_dataset_name is None:
        raise UserError(f"--eval_dataset_split {run.eval_dataset_split} has no effect without --eval_dataset_name.")
    if run.eval_fraction and run.eval_dataset_name:
        raise UserError("--eval_fraction and --eval_dataset_name both name an evaluation set; keep one.")
    if not _has_evaluation(arguments):
        needing = {
            f"--max_eval_samples {run.max_eval_samples}": run.max_eval_samples is not None,
            "--eval_strategy": _shown(training.eval_strategy) != "no",
            "--score answers (or --answer_pattern)": wants_answers(scoring, run.task),
        }
        for flag in (name for name, given in needing.items() if given):
            raise UserError(f"{flag} has no effect without evaluation data: --eval_dataset_name, or --eval_fraction.")


def _check_weights(run: RunArguments) -> None:
    weights, sets = run.dataset_weights, len(run.dataset_name)
    if not weights:
        if run.dataset_stopping != "first_exhausted":
            raise UserError(f"--dataset_stopping {run.dataset_stopping} has no effect without --dataset_weights.")
        return
    if sets < 2 or len(weights) != sets:
        raise UserError(
            f"--dataset_weights has {len(weights)} value(s) for {sets} data set(s); give one per data set, for two or "
            "more."
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"--dataset_weights {weight} must be above 0; leave out a data set that is not wanted.")


def _check_streaming(arguments: Arguments) -> None:
    run, training = arguments.run, arguments.training
    if training.max_steps < 1:
        raise UserError("--streaming needs --max_steps: how many rows a stream has shows at its end alone.")
    if run.eval_fraction:
        raise UserError(
            f"--eval_fraction {run.eval_fraction} needs all rows, and --streaming reads them one by one. Name an "
            "evaluation set with --eval_dataset_name."
        )
    if training.dataloader_num_workers:
        raise UserError(
            f"--dataloader_num_workers {training.dataloader_num_workers} with --streaming: workers split a stream by "
            "its files, and what is cut is counted in their processes. Use 0."
        )


def _check_packing(arguments: Arguments) -> None:
    training = arguments.training
    if arguments.run.task != "causal-lm":
        raise UserError(f"--packing is not for --task {arguments.run.task}; TRL packs text alone.")
    if training.packing_strategy == "wrapped":
        raise UserError(
            "--packing_strategy wrapped cuts rows anywhere and lets a row attend to those before it in its pack. Use "
            "bfd (long rows are cut) or bfd_split (long rows are continued in another pack)."
        )
    if training.max_length is None:
        raise UserError("--packing needs --max_length, the length of a pack.")


def _shown(value: Any) -> str:
    return str(getattr(value, "value", value))
