"""Elastic checkpoints: what a run must keep, by parameter and global expert, so that any other topology can go on.

A folder with one safetensors file per adapted module and `elastic.json`, which names them:

    <parameter>|weight           the whole parameter in the optimizer's precision, all experts
    <parameter>|<state>          the optimizer's state of the same shape (exp_avg, exp_avg_sq, momentum_buffer, ...)

Saving gathers one tensor of one module at a time to rank 0; loading reads on every rank what that rank owns. Frozen
parameters and buffers are not in it: the base model comes from where it came from.
"""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ..optimizer.sharding.zero import accumulation_boundary
from .elastic_folder import FORMAT, read_manifest, try_to_publish, try_to_write
from .run_state import restore_run_state, run_state

if TYPE_CHECKING:
    from .trained import Trained, TrainedParameters


def save_elastic(engine: Any, folder: str | Path) -> None:
    """Writes an elastic checkpoint. Every rank has to call it, between two optimizer steps.

    Rank 0 holds one module's parameters and states at a time. The folder appears when it is complete: it is written
    under another name, and replaces an older one of its own name.

    Args:
        engine: what `deepspeed.initialize` returned, with ZeRO stage 0 to 3 and any `ep_size`.
        folder: where to; seen by rank 0, and by every rank that will load it.

    Raises:
        ValueError: in the midst of gradient accumulation, or with an arrangement or scheduler that cannot be told.
        RuntimeError: rank 0 could not write; raised on every rank.
    """
    from .trained import TrainedParameters, topology  # they need DeepSpeed, which need not be installed

    told = accumulation_boundary(engine)
    if not (engine.micro_steps % engine.gradient_accumulation_steps() == 0 if told is None else told):
        raise ValueError(
            f"an elastic checkpoint is saved between optimizer steps; {engine.micro_steps} micro-steps were done, of "
            f"{engine.gradient_accumulation_steps()} per step. Save after engine.step() at an accumulation boundary."
        )
    parameters = TrainedParameters(engine)
    _check_ownership(parameters, engine.device)
    folder, is_writer = Path(folder), dist.get_rank() == 0
    partial = folder.with_name(f".{folder.name}.partial")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "topology": topology(engine),
        "optimizer": type(parameters.optimizer).__name__,
        "train_batch_size": engine.train_batch_size(),
        "run": run_state(engine),
        "parameters": {},
        "files": {},
    }
    failure: str | None = None
    try:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = str(error)
    for number, (module, members) in enumerate(groupby(parameters, key=lambda t: _module(t.name))):
        tensors: dict[str, Tensor] = {}
        for trained in members:  # every rank goes through all of them, whatever befalls the writer
            gathered, entry = _gather(parameters, trained, engine.device)
            manifest["parameters"][trained.name] = {**entry, "file": f"{number:05d}.safetensors"}
            tensors.update(gathered)
        if is_writer and failure is None:
            failure = try_to_write(partial / f"{number:05d}.safetensors", tensors, module)
    if is_writer and failure is None:
        manifest["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        failure = try_to_publish(partial, folder, manifest)
    _agree(failure, f"the elastic checkpoint {folder} could not be written")


def load_elastic(engine: Any, folder: str | Path) -> None:
    """Continues from an elastic checkpoint, whatever topology saved it. Every rank has to call it.

    Restores the trained weights, the optimizer's state, step counters, learning rates, the scheduler's position and the
    loss scale. Other hyperparameters are those of the engine.

    Args:
        engine: fresh from `deepspeed.initialize`, with the same adapter and optimizer.
        folder: what `save_elastic` wrote.

    Raises:
        ValueError: the folder is incomplete, or of other parameters or another optimizer. Nothing was changed then.
        RuntimeError: another rank failed.
    """
    from .trained import TrainedParameters

    folder = Path(folder)
    manifest = read_manifest(folder)
    parameters = TrainedParameters(engine)
    _check_fit(manifest, parameters, folder)
    failure = None
    try:
        for trained in parameters:
            _restore(parameters, trained, manifest["parameters"][trained.name], folder)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    _agree(failure, f"the elastic checkpoint {folder} could not be loaded")
    for trained in parameters:
        parameters.optimizer.param_groups[trained.group]["lr"] = manifest["parameters"][trained.name]["lr"]
    restore_run_state(engine, manifest["run"])


def why_not_elastic(engine: Any) -> str | None:
    """What keeps this engine from elastic checkpoints, to be known before hours of training; None: nothing does."""
    from .trained import TrainedParameters

    try:
        _check_ownership(TrainedParameters(engine), engine.device)
        run_state(engine)
    except ValueError as error:
        return str(error)
    return None


def topology_changes(engine: Any, folder: str | Path) -> list[str]:
    """What differs between the run that saved an elastic checkpoint and this one, e.g. ["world_size 8 -> 2"]."""
    from .trained import topology

    saved = read_manifest(Path(folder))["topology"]
    return [f"{name} {saved[name]} -> {value}" for name, value in topology(engine).items() if saved[name] != value]


# -- saving -----------------------------------------------------------------------------------------------------------


def _module(name: str) -> str:
    """The adapted module that a parameter belongs to; its own module for parameters outside the adapter."""
    return name.split(".moelora_experts.")[0] if ".moelora_experts." in name else name.rpartition(".")[0]


def _check_ownership(parameters: TrainedParameters, device: Any) -> None:
    """Every element of every parameter must have exactly one rank that gives it.

    Raises:
        ValueError: naming the parameter; on every rank.
    """
    given = torch.tensor([t.length if t.speaks else 0 for t in parameters], device=device)
    dist.all_reduce(given)
    for trained, count in zip(parameters, given.tolist(), strict=True):
        if count != _numel(trained.shape):
            raise ValueError(
                f"{trained.name} has {_numel(trained.shape)} elements, but the ranks together own {count}: this way of "
                "sharding is not known to elastic checkpoints. Use DeepSpeed's own (engine.save_checkpoint)."
            )


def _gather(parameters: TrainedParameters, trained: Trained, device: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A parameter's weight and states, whole, on rank 0 ({} elsewhere), and its entry in the manifest."""
    unit = trained.placement.unit
    local = {"weight": trained.local(parameters.storage.flat(unit)[0])}
    numbers: dict[str, Any] = {}
    held_numel = parameters.storage.held(unit).numel()
    for name, value in parameters.state(unit).items():
        if isinstance(value, Tensor) and value.numel() == held_numel and name != "step":
            local[name] = trained.local(value)
        elif value is not None:  # torch's SGD has an empty momentum_buffer without momentum
            number = value.item() if isinstance(value, Tensor) else value
            numbers[name] = {"value": number, "tensor": isinstance(value, Tensor)}
    tensors = {}
    for name, part in local.items():
        whole = torch.zeros(_numel(trained.shape), dtype=part.dtype, device=device)
        if trained.speaks:
            whole[trained.start : trained.start + trained.length] = part.to(device)
        dist.reduce(whole, 0)
        if dist.get_rank() == 0:
            tensors[f"{trained.name}|{name}"] = whole.view(trained.shape).cpu()
    lr = parameters.optimizer.param_groups[trained.group]["lr"]
    entry = {"shape": list(trained.shape), "states": [n for n in local if n != "weight"], "numbers": numbers}
    return tensors, {**entry, "lr": float(lr)}


def _agree(failure: str | None, what: str) -> None:
    """Raises on every rank if any has failed: no rank goes on alone, and none waits for one that is gone."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    told = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
    if told:
        raise RuntimeError(f"{what} ({'; '.join(told)}).")


# -- loading ----------------------------------------------------------------------------------------------------------


def _check_fit(manifest: dict[str, Any], parameters: TrainedParameters, folder: Path) -> None:
    """Raises a ValueError, on every rank alike, unless the checkpoint is of this model and optimizer."""
    running, saved_by = type(parameters.optimizer).__name__, manifest["optimizer"]
    if running != saved_by:
        raise ValueError(f"{folder} was saved by {saved_by}, this run trains with {running}: use {saved_by}.")
    saved = manifest["parameters"]
    mine = {t.name: list(t.shape) for t in parameters}
    missing, unknown = sorted(mine.keys() - saved.keys()), sorted(saved.keys() - mine.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder} is of another model or adapter: it lacks {len(missing)} of the trained parameters "
            f"({', '.join(missing[:3])}); {len(unknown)} of its own are not trained here ({', '.join(unknown[:3])})."
        )
    for name, shape in mine.items():
        if shape != saved[name]["shape"]:
            raise ValueError(
                f"{folder} has {name} with shape {saved[name]['shape']}, this run has {shape}: r, num_experts and the "
                "base model must be those of the run that saved it."
            )
    for unit in {t.placement.unit for t in parameters}:
        members = [t.name for t in parameters if t.placement.unit == unit]
        with_state = [name for name in members if saved[name]["numbers"] or saved[name]["states"]]
        for name in with_state[1:]:
            if saved[name]["numbers"] != saved[with_state[0]]["numbers"]:
                raise ValueError(
                    f"{name} and {with_state[0]} were updated unequally often ({saved[name]['numbers']}, "
                    f"{saved[with_state[0]]['numbers']}), but ZeRO keeps one count for both: resume without ZeRO."
                )
    lrs: dict[int, set[float]] = {}
    for t in parameters:
        lrs.setdefault(t.group, set()).add(saved[t.name]["lr"])
    for group, values in lrs.items():
        if len(values) > 1:
            raise ValueError(f"parameter group {group} mixes parameters saved with learning rates {sorted(values)}.")


def _restore(parameters: TrainedParameters, trained: Trained, entry: dict[str, Any], folder: Path) -> None:
    """Fills in one parameter and this rank's part of its state."""
    place = trained.placement
    held = parameters.storage.held(place.unit)
    with safe_open(folder / entry["file"], framework="pt") as file:

        def mine(key: str) -> Tensor:
            """This rank's experts, or the whole parameter, flat."""
            first, rows = trained.offset * trained.shape[0] // _numel(trained.shape), _rows_here(trained)
            return file.get_slice(f"{trained.name}|{key}")[first : first + rows].reshape(-1)

        parameters.write(trained, mine("weight").to(held.device))
        if not (entry["states"] or entry["numbers"]):
            return
        state = parameters.optimizer.state[held]
        for name in entry["states"]:
            values = mine(name)
            if not isinstance(state.get(name), Tensor):
                state[name] = torch.zeros_like(held, dtype=values.dtype, requires_grad=False)
            trained.local(state[name]).copy_(values[place.start : place.stop])
        for name, number in entry["numbers"].items():
            value = number["value"]
            state[name] = torch.tensor(float(value), dtype=torch.float32) if number["tensor"] else value


def _rows_here(trained: Trained) -> int:
    """How many rows of the whole parameter's first dimension this rank's parameter has."""
    return trained.placement.numel * trained.shape[0] // max(_numel(trained.shape), 1)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
