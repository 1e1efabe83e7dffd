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
from transformers.trainer_utils import get_last_checkpoint

from ds_moelora.core.expert_parallel import check_ep_size
from ds_moelora.core.pairs import GATE_SCALINGS
from ds_moelora.parallel.checkpoint import check_checkpoint
from ds_moelora.parallel.elastic import read_manifest
from launch.arguments import Arguments
from launch.bounds import check_bounds
from launch.deepspeed_config import check_deepspeed_config
from launch.errors import UserError, process_rank
from launch.extensions import check_build_lock
from launch.flags import RunArguments
from launch.trusted import check_trusted

# The keys that transformers fills in; "auto" anywhere else would reach the optimizer as a string.
AUTO_KEYS = ("lr", "betas", "eps", "weight_decay")
TASK_FLAGS = {
    "prompt_template": ("causal-lm",),
    "instruction_column": ("causal-lm",),
    "input_column": ("causal-lm",),
    "output_column": ("causal-lm",),
    "text_column": ("sequence-classification",),
    "text_pair_column": ("sequence-classification",),
    "text_pattern": ("sequence-classification",),
    "image_column": ("image-classification",),
    "label_column": ("sequence-classification", "image-classification"),
}
OURS = ("GateRiemannianAdamW", "GateRiemannianSGD")


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
    return block["type"]


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
    for key in ("damping", "gate_lr_scale"):
        value = params.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UserError(f"{path}: {key} is {value!r}; it must be a finite number that is not negative.")


def _is_optimizer(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)


def check_output_dir(arguments: Arguments) -> None:
    """Settles where results go and which checkpoint to go on from; writes nothing.

    `resume_from_checkpoint` is replaced by the path of a checkpoint, or None.

    Raises:
        UserError: a non-empty folder without resume or overwrite, or a checkpoint that is not there.
    """
    training = arguments.training
    output_dir = Path(training.output_dir)
    _check_place(output_dir)
    training.resume_from_checkpoint = _find_checkpoint(training.resume_from_checkpoint, output_dir)
    if training.resume_from_checkpoint is not None:
        if arguments.run.overwrite_output_dir:
            raise UserError("--overwrite_output_dir and --resume_from_checkpoint contradict each other; keep one.")
        return
    if not arguments.run.overwrite_output_dir and output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"--output_dir {output_dir} is not empty. Choose another folder, go on from its newest checkpoint with "
            "--resume_from_checkpoint true, or write over it with --overwrite_output_dir."
        )


def _check_place(output_dir: Path) -> None:
    """Whether a folder is there, or can be made."""
    try:
        output_dir.exists()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; choose another name.") from error
    nearest = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {output_dir}: {nearest} is a file; name a folder.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {nearest} cannot be written to; choose another folder.")


def check_resumed_topology(arguments: Arguments) -> None:
    """Finds a checkpoint without elastic part whose experts lay on other ranks: their state cannot be moved.

    Raises:
        UserError: the checkpoint was saved with another `ep_size`, or its elastic part is incomplete.
    """
    folder, wanted = arguments.training.resume_from_checkpoint, arguments.adapter.ep_size
    if folder is None:
        return
    elastic = Path(folder) / "elastic"
    if elastic.is_dir():
        try:
            read_manifest(elastic)
        except ValueError as error:
            raise UserError(f"--resume_from_checkpoint: {error}") from error
        return
    files = sorted(Path(folder).glob("global_step*/layer_*_expert_*_model_states.pt"))
    saved = 1
    if files:
        tensors = torch.load(files[0], map_location="cpu", weights_only=True)
        saved = next((int(t[0]) for name, t in tensors.items() if name.endswith(".topology")), 0)
    if saved != wanted:
        raise UserError(
            f"--resume_from_checkpoint {folder} was saved with --ep_size {saved}, this run has {wanted}, and it has no "
            f"elastic part. Resume with --ep_size {saved}; the adapter in that folder can be loaded under any ep_size, "
            "without optimizer state."
        )


def _find_checkpoint(wish: str | None, output_dir: Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means."""
    if wish is None or str(wish).lower() in ("false", "no", "none"):
        return None
    if str(wish).lower() in ("true", "yes", "last"):
        newest = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if newest is None:
            raise UserError(f"--resume_from_checkpoint {wish}: {output_dir} has no checkpoint-* folder.")
        return _whole(newest)
    if not (Path(wish) / "trainer_state.json").is_file():
        here = sorted(str(p) for p in output_dir.glob("checkpoint-*")) if output_dir.is_dir() else []
        found = f" {output_dir} has: {', '.join(here)}." if here else f" {output_dir} has none either."
        raise UserError(f"--resume_from_checkpoint {wish}: there is no checkpoint (no trainer_state.json).{found}")
    return _whole(str(wish))


def _whole(checkpoint: str) -> str:
    """The checkpoint, if no file of it was cut short when it was saved."""
    try:
        check_checkpoint(checkpoint)
    except ValueError as error:
        raise UserError(f"--resume_from_checkpoint: {error}") from error
    return checkpoint


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


def check_task(arguments: Arguments) -> None:
    """Refuses flags that mean nothing to the task.

    Raises:
        UserError: naming the flag and the tasks it is for.
    """
    run = arguments.run
    for name, tasks in TASK_FLAGS.items():
        if run.task not in tasks and getattr(run, name) != getattr(RunArguments, name):
            raise UserError(f"--{name} has no effect with --task {run.task}; it is for {' and '.join(tasks)}.")


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
    if read_deepspeed_config(path).get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError(
            f"--ep_size {adapter.ep_size} with {path}: ZeRO stage 3 shards the experts over all ranks already. Use "
            "--ep_size 1, or a config of stage 1 or 2 such as configs/zero2_ep.json."
        )


def preflight(arguments: Arguments) -> str:
    """All checks of this module; returns the optimizer's name."""
    check_build_lock()
    check_numbers(arguments)
    check_bounds(arguments.training)
    check_task(arguments)
    check_loss(arguments)
    name = check_optimizer(arguments)
    check_expert_parallel(arguments)
    check_output_dir(arguments)
    check_trusted(arguments)
    check_resumed_topology(arguments)
    return name
