"""Elastic checkpoints: what a run must keep, by parameter and global expert, so that any other topology can go on.

Saving gathers the parts that every process owns to process 0 (`gather`), which writes them (`manifest`). Loading reads
on every process what that process owns. Frozen parameters are left out: the base model comes from where it came from.
Buffers of the model are saved.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..optimizer.sharding.zero import accumulation_boundary
from .gather import Segment, gather
from .manifest import TensorFiles, check_contents, publish, read_manifest, write_manifest
from .processes import NotFiniteError, agree, rank, together, world_size
from .record import REFUSE, TABLE, compare, refuse_others, run_record, verdict
from .run_state import base_rate, restore_run_state, run_state
from .trained import Run, Trained, TrainedParameters, check_ownership

logger = logging.getLogger("ds_moelora")


def save_elastic(engine: Any, folder: str | Path) -> None:
    """Writes an elastic checkpoint. Every process has to call it, between two optimizer steps.

    The folder appears when it is complete: it is written under another name, and replaces an older one of its name.

    Args:
        engine: what `deepspeed.initialize` returned, with ZeRO stage 0 to 3 and any `ep_size`.
        folder: where to; seen by process 0, and by every process that will load it.

    Raises:
        ValueError: in the midst of gradient accumulation, an arrangement or scheduler that is not known, or weights
            that are not finite.
        RuntimeError: process 0 could not write; raised on every process.
    """
    at_boundary = accumulation_boundary(engine)
    if at_boundary is None:
        at_boundary = engine.micro_steps % engine.gradient_accumulation_steps() == 0
    if not at_boundary:
        raise ValueError(
            f"an elastic checkpoint is saved between optimizer steps; {engine.micro_steps} micro-steps were done, of "
            f"{engine.gradient_accumulation_steps()} per step. Save after engine.step() at an accumulation boundary."
        )
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    what = f"the elastic checkpoint {folder} could not be written"
    with together(what, OSError):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    manifest, _ = write_state(Run.of(engine), partial)
    with together(what, OSError):
        if rank() == 0:
            write_manifest(partial, manifest)
            publish(partial, folder)


def write_state(
    run: Run, folder: Path, extra: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Writes the tensors of a run into a folder that exists. Every process has to call it.

    Args:
        extra: further entries of the record.

    Returns:
        on process 0 the manifest, to be completed by `write_manifest`, and the trained weights as the model has them.

    Raises:
        NotFiniteError: weights or optimizer state are not finite.
        RuntimeError: process 0 could not write; raised on every process.
    """
    parameters = TrainedParameters(run)
    check_ownership(parameters, run.device)
    manifest = {"record": {**run_record(run), **(extra or {})}, "run": run_state(run)}
    buffers = _buffers(run.module) if rank() == 0 else {}
    files = TensorFiles(folder)
    with together(f"{folder} could not be written", Exception):
        try:
            weights = _gather_finite(run, parameters, files)
            for name, buffer in buffers.items():
                files.add(f"{name}|buffer", buffer.detach().cpu().contiguous())
        finally:  # its thread is ended, whatever was raised
            manifest |= {"files": files.close(), "tensors": files.where}
    manifest["parameters"] = {
        trained.name: {
            "numbers": parameters.state(trained)[1],
            "lr": float(run.optimizer.param_groups[trained.group]["lr"]),
            "base_lr": base_rate(run.optimizer, run.optimizer.param_groups[trained.group]),
        }
        for trained in parameters
    }
    return manifest, weights


def gather_weights(run: Run) -> dict[str, Tensor]:
    """Every trained parameter, whole, in the model's precision, on process 0's CPU; {} elsewhere. A collective call.

    Raises:
        NotFiniteError: on every process; naming the parameter.
    """
    return _gather_finite(run, TrainedParameters(run), None)


def load_elastic(engine: Any, folder: str | Path) -> None:
    """Continues from an elastic checkpoint, whatever topology saved it. Every process has to call it.

    Restores the trained weights, the optimizer's state, step counters, learning rates, the scheduler's position and the
    loss scale. Other hyperparameters are those of the engine, and so is a base learning rate that has changed.

    Args:
        engine: fresh from `deepspeed.initialize`, with the same adapter and optimizer.
        folder: what `save_elastic` or the launcher wrote.

    Raises:
        ValueError: the folder is damaged, or of another adapter, base model or optimizer. Nothing was changed then.
        RuntimeError: a process failed while the state was set.
    """
    run, folder = Run.of(engine), Path(folder)
    manifest, lines = check_state(run, folder)
    for line in lines if rank() == 0 else []:
        logger.warning(line)
    restore_state(run, folder, manifest)


def check_state(
    run: Run,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    table: Iterable[tuple[str, str]] = TABLE,
    contents: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """The manifest of a checkpoint that is whole and of this run, and what differs. A collective call; changes nothing.

    Args:
        extra: this run's further entries of the record; None: entries that only the checkpoint has are passed over.
        table: what becomes of differences.
        contents: also hash the files, each process its share; False where that has been done.

    Raises:
        ValueError: on every process.
    """
    parameters, mine = TrainedParameters(run), {**run_record(run), **(extra or {})}
    with together(f"the elastic checkpoint {folder} cannot be loaded", ValueError, OSError, KeyError, kind=ValueError):
        manifest = read_manifest(folder)
        if "parameters" not in manifest:
            raise ValueError(f"{folder} holds the adapter alone, without optimizer state.")
        saved = manifest["record"]
        if extra is None:
            saved = {name: value for name, value in saved.items() if name in mine or verdict(name) == REFUSE}
        lines = refuse_others(compare(saved, mine, table), str(folder))
        _check_numbers(manifest["parameters"], parameters)
        if contents:
            check_contents(folder, manifest, (rank(), world_size()))
    return manifest, lines


@torch.no_grad()
def restore_state(run: Run, folder: Path, manifest: dict[str, Any]) -> None:
    """Sets weights, optimizer, counters, scheduler and loss scale. Every process has to call it after `check_state`.

    Raises:
        RuntimeError: a process failed.
    """
    parameters = TrainedParameters(run)
    with together(f"the elastic checkpoint {folder} could not be loaded", Exception):
        with ExitStack() as stack:
            opened = functools.cache(lambda name: stack.enter_context(safe_open(folder / name, framework="pt")))
            tensors: dict[str, dict[str, Any]] = {}  # {parameter or buffer: {kind: open file}}
            for key, file in manifest["tensors"].items():
                name, _, kind = key.rpartition("|")
                tensors.setdefault(name, {})[kind] = opened(file)
            for trained in parameters:
                entry, group = manifest["parameters"][trained.name], run.optimizer.param_groups[trained.group]
                _restore(parameters, trained, entry["numbers"], tensors[trained.name])
                base, saved_base = base_rate(run.optimizer, group), entry["base_lr"]
                if base == saved_base:
                    group["lr"] = entry["lr"]
                else:  # the same place of a schedule that begins at another rate
                    group["lr"] = entry["lr"] * base / saved_base if saved_base else base
            for name, buffer in _buffers(run.module).items():
                if "buffer" in tensors.get(name, {}):
                    buffer.copy_(tensors[name]["buffer"].get_tensor(f"{name}|buffer"))
        restore_run_state(run, manifest["run"])


def why_not_elastic(run: Run) -> str | None:
    """What keeps a run from elastic checkpoints, to be known before hours of training; None: nothing does."""
    try:
        check_ownership(TrainedParameters(run), run.device)
        run_state(run)
    except ValueError as error:
        return str(error)
    return None


def _gather_finite(run: Run, parameters: TrainedParameters, files: TensorFiles | None) -> dict[str, Tensor]:
    """Gathers the trained weights and, where there are `files` for them, also the optimizer's tensors.

    Raises:
        NotFiniteError: on every process, when everything has been gathered.
    """
    failure, weights, module = None, {}, None
    segments = [s for trained in parameters for s in parameters.segments(trained, states=files is not None)]
    dtypes = {trained.name: trained.param.dtype for trained in parameters}
    for segment, whole in gather(segments, run.device):
        failure = failure or _not_finite(segment, whole)
        if segment.key == "weight":
            weights[segment.name] = whole.to(dtypes[segment.name])
        if files is not None:
            if module not in (None, _module(segment.name)):
                files.end_file()
            module = _module(segment.name)
            files.add(f"{segment.name}|{segment.key}", whole)
    agree(failure, "the trained weights could not be gathered")
    return weights


def _not_finite(segment: Segment, whole: Tensor) -> Exception | None:
    if not whole.is_floating_point() or bool(torch.isfinite(whole).all()):
        return None
    what = "its weights" if segment.key == "weight" else f"the optimizer's {segment.key}"
    return NotFiniteError(f"{segment.name} is not finite ({what}): nothing was saved.")


def _module(name: str) -> str:
    """The adapted module that a parameter belongs to; its own module for parameters outside the adapter."""
    return name.split(".moelora_experts.")[0] if ".moelora_experts." in name else name.rpartition(".")[0]


def _buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """What is no parameter, yet changes in training and is saved with a model: running statistics, above all."""
    saved = {*module.state_dict(keep_vars=True)} if any(True for _ in module.buffers()) else set()
    ours = ("initial_A", "initial_B", "base_hash", "topology")  # made by the start, not by training
    return {
        name: buffer
        for name, buffer in sorted(module.named_buffers())
        if name in saved and not name.endswith(ours) and not buffer.is_meta
    }


def _check_numbers(saved: Mapping[str, Any], parameters: TrainedParameters) -> None:
    """A unit has one count of steps: refuses parameters in it that were updated unequally often."""
    first: dict[Any, Trained] = {}
    for trained in parameters:
        numbers = saved[trained.name]["numbers"]
        other = first.setdefault(trained.placement.unit, trained) if numbers else trained
        if saved[other.name]["numbers"] != numbers:
            raise ValueError(
                f"{trained.name} and {other.name} were updated unequally often ({numbers}, "
                f"{saved[other.name]['numbers']}), but this topology keeps one count for both: resume in the topology "
                "that saved them."
            )


def _restore(
    parameters: TrainedParameters, trained: Trained, numbers: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """Fills in one parameter and this process's part of its state.

    Args:
        files: {"weight" or the name of a state: the open file that has it}.
    """
    place, held = trained.placement, parameters.storage.held(trained.placement.unit)

    def rows_of(kind: str) -> Tensor:
        return files[kind].get_slice(f"{trained.name}|{kind}")[trained.rows].reshape(-1)

    parameters.write(trained, rows_of("weight").to(held.device))
    kinds = [kind for kind in files if kind != "weight"]
    if not kinds and not numbers:
        return
    state = parameters.optimizer.state[held]
    for kind in kinds:
        key = f"{trained.name}|{kind}"
        if tuple(files[kind].get_slice(key).get_shape()) != trained.shape:
            state[kind] = files[kind].get_tensor(key).to(held.device)
            continue
        values = rows_of(kind)
        if not isinstance(state.get(kind), Tensor) or state[kind].numel() != held.numel():
            state[kind] = torch.zeros_like(held, dtype=values.dtype, requires_grad=False)
        trained.local(state[kind]).copy_(values[place.start : place.stop])
    for name, number in numbers.items():
        value = number["value"]
        state[name] = torch.tensor(float(value), dtype=torch.float32) if number["tensor"] else value
