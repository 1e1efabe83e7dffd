"""Elastic checkpoints: what a run must keep, by parameter and global expert, so that any other topology can go on.

Saving packs the parts that every process owns into buckets of at most `BUCKET_BYTES`; one reduction per bucket brings
them to process 0 as they are, to the bit. Loading reads on every process what that process owns.

Frozen parameters are not in it: the base model comes from where it came from. Buffers of the model are.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ..optimizer.sharding.zero import accumulation_boundary
from .processes import NotFiniteError, agree, everyone, rank, world_size
from .record import compare, refuse_others, run_record
from .run_state import base_rate, restore_run_state, run_state
from .state_folder import (
    FORMAT,
    MANIFEST,
    TensorFiles,
    check_contents,
    publish,
    read_manifest,
    sha256,
    write_manifest,
)
from .trained import Run, Trained, TrainedParameters, topology

logger = logging.getLogger("ds_moelora")
BUCKET_BYTES = 1 << 26
ALIGNMENT = 8  # bytes: any dtype's view of a bucket


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
    told = accumulation_boundary(engine)
    if not (engine.micro_steps % engine.gradient_accumulation_steps() == 0 if told is None else told):
        raise ValueError(
            f"an elastic checkpoint is saved between optimizer steps; {engine.micro_steps} micro-steps were done, of "
            f"{engine.gradient_accumulation_steps()} per step. Save after engine.step() at an accumulation boundary."
        )
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    failure: Exception | None = None
    try:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as error:
        failure = error
    what = f"the elastic checkpoint {folder} could not be written"
    agree(failure, what)
    try:
        write_state(Run.of(engine), partial)
        if rank() == 0:
            publish(partial, folder)
    except OSError as error:
        failure = error
    agree(failure, what)


def write_state(run: Run, folder: Path, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes the state of a run into a folder that exists. Every process has to call it.

    Args:
        extra: further entries of the record (see `record`).

    Returns:
        on process 0 the files' sizes and hashes and, under their names, the trained weights as the model has them;
        {} elsewhere: {"files": {name: {"size", "sha256"}}, "weights": {parameter: tensor}}.

    Raises:
        NotFiniteError: weights or optimizer state are not finite.
        RuntimeError: process 0 could not write; raised on every process.
    """
    parameters = TrainedParameters(run)
    check_ownership(parameters, run.device)
    record = {**run_record(run.module, run.optimizer), **(extra or {})}
    buffers = _buffers(run.module)
    segments = [segment for trained in parameters for segment in _segments(parameters, trained)]
    files, weights, failure = (TensorFiles(folder) if rank() == 0 else None), {}, None
    module = None
    for segment, whole in gather(segments, run.device):
        assert files is not None
        failure = failure or _not_finite(segment, whole)
        if module not in (None, _module(segment.trained.name)):
            files.end_file()
        module = _module(segment.trained.name)
        files.add(f"{segment.trained.name}|{segment.key}", whole)
        if segment.key == "weight":
            weights[segment.trained.name] = whole.to(segment.trained.param.dtype)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "topology": topology(run),
        "optimizer": type(run.optimizer).__name__,
        "train_batch_size": run.engine.train_batch_size() if run.engine is not None else 0,
        "record": record,
        "run": run_state(run),
    }
    written: dict[str, Any] = {}
    if files is not None:
        try:
            for name, buffer in buffers.items():
                files.add(f"{name}|buffer", buffer.detach().cpu().contiguous())
            manifest["files"] = files.close()
            manifest["parameters"] = {t.name: _entry(parameters, t, segments, files.where) for t in parameters}
            manifest["buffers"] = {
                name: {"file": files.where[f"{name}|buffer"], "shape": list(buffer.shape)}
                for name, buffer in buffers.items()
            }
            write_manifest(folder, manifest)
            written = {
                MANIFEST: {"size": (folder / MANIFEST).stat().st_size, "sha256": sha256(folder / MANIFEST)},
                **manifest["files"],
            }
        except Exception as error:  # told to every process
            failure = failure or error
    agree(failure, f"{folder} could not be written")
    return {"files": written, "weights": weights} if rank() == 0 else {}


def gather_weights(run: Run) -> dict[str, Tensor]:
    """Every trained parameter, whole, in the model's precision, on process 0's CPU; {} elsewhere. A collective call.

    Raises:
        NotFiniteError: on every process; naming the parameter.
    """
    parameters = TrainedParameters(run)
    segments = [_segment(parameters, trained, "weight") for trained in parameters]
    failure, weights = None, {}
    for segment, whole in gather(segments, run.device):
        failure = failure or _not_finite(segment, whole)
        weights[segment.trained.name] = whole.to(segment.trained.param.dtype)
    agree(failure, "the trained weights could not be gathered")
    return weights


def load_elastic(engine: Any, folder: str | Path) -> None:
    """Continues from an elastic checkpoint, whatever topology saved it. Every process has to call it.

    Restores the trained weights, the optimizer's state, step counters, learning rates, the scheduler's position and the
    loss scale. Other hyperparameters are those of the engine, and so is a base learning rate that has changed.

    Args:
        engine: fresh from `deepspeed.initialize`, with the same adapter and optimizer.
        folder: what `save_elastic` wrote.

    Raises:
        ValueError: the folder is damaged, or of another adapter, base model or optimizer. Nothing was changed then.
        RuntimeError: a process failed while the state was set.
    """
    run, folder = Run.of(engine), Path(folder)
    manifest = check_state(run, folder)
    for line in refuse_others(compare(manifest["record"], run_record(run.module, run.optimizer)), str(folder)):
        if rank() == 0:
            logger.warning(line)
    restore_state(run, folder, manifest)


def check_state(run: Run, folder: Path, contents: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and of this run's parameters. A collective call; changes nothing.

    Args:
        contents: also hash the files, each process its share; False where that has been done.

    Raises:
        ValueError: on every process.
    """
    failure, manifest = None, {}
    try:
        manifest = read_manifest(folder)
        _check_fit(manifest, TrainedParameters(run), folder)
        if contents:
            check_contents(folder, manifest, (rank(), world_size()))
    except (ValueError, OSError) as error:
        failure = error
    agree(failure, f"the elastic checkpoint {folder} cannot be loaded", ValueError)
    return manifest


@torch.no_grad()
def restore_state(run: Run, folder: Path, manifest: dict[str, Any]) -> None:
    """Sets weights, optimizer, counters, scheduler and loss scale. Every process has to call it after `check_state`.

    Raises:
        RuntimeError: a process failed.
    """
    parameters = TrainedParameters(run)
    groups, failure = run.optimizer.param_groups, None
    try:
        with _OpenFiles(folder) as files:
            for trained in parameters:
                entry = manifest["parameters"][trained.name]
                _restore(parameters, trained, entry, files)
                group = groups[trained.group]
                base = base_rate(run.optimizer, group)
                group["lr"] = entry["lr"] if base == entry["base_lr"] else _scaled(entry, base)
            for name, buffer in _buffers(run.module).items():
                if name in manifest["buffers"]:
                    place = manifest["buffers"][name]
                    buffer.copy_(files.open(place["file"]).get_tensor(f"{name}|buffer"))
        restore_run_state(run, manifest["run"])
    except Exception as error:  # told to every process
        failure = error
    agree(failure, f"the elastic checkpoint {folder} could not be loaded")


def why_not_elastic(run: Run) -> str | None:
    """What keeps a run from elastic checkpoints, to be known before hours of training; None: nothing does."""
    try:
        check_ownership(TrainedParameters(run), run.device)
        run_state(run)
    except ValueError as error:
        return str(error)
    return None


def topology_changes(run: Run, manifest: Mapping[str, Any]) -> list[str]:
    """What differs between the run that saved an elastic checkpoint and this one, e.g. ["world_size 8 -> 2"]."""
    saved, mine = manifest["topology"], topology(run)
    changes = [f"{name} {saved.get(name)} -> {value}" for name, value in mine.items() if saved.get(name) != value]
    samples = run.engine.train_batch_size() if run.engine is not None else 0
    if manifest["train_batch_size"] != samples:
        changes.append(f"samples per step {manifest['train_batch_size']} -> {samples}")
    return changes


# -- saving -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Segment:
    """A tensor of one parameter that is to be gathered.

    Args:
        key: "weight", or the name of the optimizer's state.
        local: this process's elements of it, flat; the first is element `start` of the whole. None: it gives nothing.
    """

    trained: Trained
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    local: Tensor | None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Piece:
    """Elements [first, first + count) of a segment, `offset` bytes into a bucket."""

    segment: Segment
    first: int
    count: int
    offset: int

    def view(self, bucket: Tensor) -> Tensor:
        """Its place in a bucket's bytes."""
        size = self.count * self.segment.dtype.itemsize
        return bucket[self.offset : self.offset + size].view(self.segment.dtype)


def gather(segments: list[Segment], device: Any, limit: int = BUCKET_BYTES) -> Iterator[tuple[Segment, Tensor]]:
    """Brings whole tensors to process 0's CPU, in order; the other processes get none, but must go through it, too.

    Phases of a bucket: every process copies what it owns into zeros; the buckets are added up on process 0 as integers,
    which leaves every bit as it was, because each is given once.

    Raises:
        ValueError: on every process; the processes do not keep the same state.
    """
    plan = [(s.trained.name, s.key, str(s.dtype), s.shape) for s in segments]
    if len(set(everyone(hashlib.sha256(repr(plan).encode()).hexdigest()))) > 1:
        raise ValueError(
            "the processes' optimizers do not keep the same state for the same parameters: this cannot be saved as one "
            "checkpoint. Use DeepSpeed's own (engine.save_checkpoint)."
        )
    whole: dict[Segment, Tensor] = {}
    for pieces, size in _buckets(segments, limit):
        bucket = torch.zeros(size, dtype=torch.uint8, device=device)
        for piece in pieces:
            local, start = piece.segment.local, piece.segment.start
            if local is not None:
                first = max(piece.first, start)
                stop = min(piece.first + piece.count, start + local.numel())
                if first < stop:
                    piece.view(bucket)[first - piece.first : stop - piece.first] = local[first - start : stop - start]
        if world_size() > 1:
            dist.reduce(bucket.view(torch.int32), 0)
        if rank() != 0:
            continue
        bucket = bucket.cpu()
        for piece in pieces:
            segment = piece.segment
            if piece.first == 0:
                whole[segment] = torch.empty(segment.numel, dtype=segment.dtype)
            whole[segment][piece.first : piece.first + piece.count] = piece.view(bucket)
            if piece.first + piece.count == segment.numel:
                yield segment, whole.pop(segment).view(segment.shape)


def _buckets(segments: list[Segment], limit: int) -> Iterator[tuple[list[_Piece], int]]:
    """Cuts the segments into buckets of at most `limit` bytes, with their sizes; a long segment goes over several."""
    pieces: list[_Piece] = []
    size = 0
    for segment in segments:
        first = 0
        while first < segment.numel or (first == 0 and segment.numel == 0):
            count = min(segment.numel - first, (limit - size) // segment.dtype.itemsize)
            if count <= 0 and segment.numel:
                yield pieces, size
                pieces, size = [], 0
                continue
            pieces.append(_Piece(segment, first, count, size))
            size += -(-count * segment.dtype.itemsize // ALIGNMENT) * ALIGNMENT
            first += count
            if segment.numel == 0:
                break
    if pieces:
        yield pieces, size


def check_ownership(parameters: TrainedParameters, device: Any) -> None:
    """Every element of every parameter must have exactly one process that gives it. A collective call.

    Raises:
        ValueError: naming the parameter; on every process.
    """
    given = torch.tensor([t.length if t.gives else 0 for t in parameters], device=device)
    if world_size() > 1:
        dist.all_reduce(given)
    for trained, count in zip(parameters, given.tolist(), strict=True):
        if count != trained.numel:
            raise ValueError(
                f"{trained.name} has {trained.numel} elements, but the processes together own {count}: this way of "
                "sharding is not known to elastic checkpoints. Use DeepSpeed's own (engine.save_checkpoint)."
            )


def _segments(parameters: TrainedParameters, trained: Trained) -> Iterator[Segment]:
    """A parameter's weight and the optimizer's tensors for it."""
    yield _segment(parameters, trained, "weight")
    for name in _state_tensors(parameters, trained):
        yield _segment(parameters, trained, name)


def _segment(parameters: TrainedParameters, trained: Trained, key: str) -> Segment:
    unit = trained.placement.unit
    value = parameters.storage.flat(unit)[0] if key == "weight" else parameters.state(unit)[key]
    if value.numel() != parameters.storage.held(unit).numel():  # Adafactor's rows and columns
        whole = value.detach().reshape(-1) if trained.gives else None
        return Segment(trained, key, value.dtype, tuple(value.shape), 0, whole)
    local = trained.local(value.detach()) if trained.gives else None
    return Segment(trained, key, value.dtype, trained.shape, trained.start, local)


def _state_tensors(parameters: TrainedParameters, trained: Trained) -> list[str]:
    """Names of the optimizer's tensors for a parameter; single numbers are none."""
    unit = trained.placement.unit
    held, found = parameters.storage.held(unit).numel(), []
    for name, value in parameters.state(unit).items():
        if not isinstance(value, Tensor) or name == "step" or (value.numel() == 1 and held != 1):
            continue
        if value.numel() != held and parameters.storage.sharded:
            raise ValueError(
                f"{type(parameters.optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a partition of "
                f"{held} elements, which cannot be saved by parameter. Use DeepSpeed's own (engine.save_checkpoint)."
            )
        found.append(name)
    return found


def _entry(
    parameters: TrainedParameters, trained: Trained, segments: list[Segment], where: Mapping[str, str]
) -> dict[str, Any]:
    """A parameter's entry in the manifest."""
    own = [segment for segment in segments if segment.trained is trained]
    numbers = {}
    for name, value in parameters.state(trained.placement.unit).items():
        if name not in {segment.key for segment in own} and value is not None:  # SGD without momentum has None
            number = value.item() if isinstance(value, Tensor) else value
            numbers[name] = {"value": number, "tensor": isinstance(value, Tensor)}
    group = parameters.optimizer.param_groups[trained.group]
    return {
        "shape": list(trained.shape),
        "tensors": {s.key: {"file": where[f"{trained.name}|{s.key}"], "shape": list(s.shape)} for s in own},
        "numbers": numbers,
        "lr": float(group["lr"]),
        "base_lr": base_rate(parameters.optimizer, group),
    }


def _module(name: str) -> str:
    """The adapted module that a parameter belongs to; its own module for parameters outside the adapter."""
    return name.split(".moelora_experts.")[0] if ".moelora_experts." in name else name.rpartition(".")[0]


def _not_finite(segment: Segment, whole: Tensor) -> Exception | None:
    if not whole.is_floating_point() or bool(torch.isfinite(whole).all()):
        return None
    what = "its weights" if segment.key == "weight" else f"the optimizer's {segment.key}"
    return NotFiniteError(f"{segment.trained.name} is not finite ({what}): nothing was saved.")


def _buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """What is no parameter, yet changes in training and is saved with a model: running statistics, above all."""
    saved = {*module.state_dict(keep_vars=True)} if any(True for _ in module.buffers()) else set()
    ours = ("initial_A", "initial_B", "base_hash", "topology")  # made by the start, not by training
    return {
        name: buffer
        for name, buffer in sorted(module.named_buffers())
        if name in saved and not name.endswith(ours) and not buffer.is_meta
    }


# -- loading ----------------------------------------------------------------------------------------------------------


def _scaled(entry: Mapping[str, Any], base: float) -> float:
    """A learning rate at the same place of a schedule that begins at `base`."""
    return entry["lr"] * base / entry["base_lr"] if entry["base_lr"] else base


class _OpenFiles:
    """A checkpoint's files, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def open(self, name: str) -> Any:
        """The file called `name`."""
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._open[name]

    def __enter__(self) -> _OpenFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._open.values():
            file.__exit__(*error)


def _check_fit(manifest: dict[str, Any], parameters: TrainedParameters, folder: Path) -> None:
    """Raises a ValueError, on every process alike, unless the checkpoint is of this model and optimizer."""
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
        with_state = [name for name in members if saved[name]["numbers"] or len(saved[name]["tensors"]) > 1]
        for name in with_state[1:]:
            if saved[name]["numbers"] != saved[with_state[0]]["numbers"]:
                raise ValueError(
                    f"{name} and {with_state[0]} were updated unequally often ({saved[name]['numbers']}, "
                    f"{saved[with_state[0]]['numbers']}), but this topology keeps one count for both: resume in the "
                    "topology that saved them."
                )


def _restore(parameters: TrainedParameters, trained: Trained, entry: dict[str, Any], files: _OpenFiles) -> None:
    """Fills in one parameter and this process's part of its state."""
    place = trained.placement
    held = parameters.storage.held(place.unit)

    def read(key: str) -> Tensor:
        """This process's experts, or the whole tensor, flat."""
        part = files.open(entry["tensors"][key]["file"]).get_slice(f"{trained.name}|{key}")
        if entry["tensors"][key]["shape"] != list(trained.shape):
            return part[:]
        first, rows = trained.offset * trained.shape[0] // trained.numel, _rows_here(trained)
        return part[first : first + rows].reshape(-1)

    parameters.write(trained, read("weight").to(held.device))
    states = [key for key in entry["tensors"] if key != "weight"]
    if not (states or entry["numbers"]):
        return
    state = parameters.optimizer.state[held]
    for name in states:
        values = read(name)
        if entry["tensors"][name]["shape"] != list(trained.shape):
            state[name] = values.to(held.device)
            continue
        if not isinstance(state.get(name), Tensor) or state[name].numel() != held.numel():
            state[name] = torch.zeros_like(held, dtype=values.dtype, requires_grad=False)
        trained.local(state[name]).copy_(values[place.start : place.stop])
    for name, number in entry["numbers"].items():
        value = number["value"]
        state[name] = torch.tensor(float(value), dtype=torch.float32) if number["tensor"] else value


def _rows_here(trained: Trained) -> int:
    """How many rows of the whole parameter's first dimension this process's parameter has."""
    return trained.placement.numel * trained.shape[0] // max(trained.numel, 1)
