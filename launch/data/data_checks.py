"""What can be wrong about data sets, streams and packing before any of them is read."""

from __future__ import annotations

import math

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError


def check_data(arguments: Arguments) -> None:
    """All checks of this module."""
    _check_weights(arguments)
    if arguments.run.streaming:
        _check_streaming(arguments)
    if getattr(arguments.training, "packing", False):
        _check_packing(arguments)


def _check_weights(arguments: Arguments) -> None:
    run = arguments.run
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
