"""The folder of an elastic checkpoint on disk: safetensors files, and `elastic.json`, which describes them.

    <parameter>|weight     the whole parameter in the optimizer's precision, all experts
    <parameter>|<state>    the optimizer's state of the same shape (exp_avg, exp_avg_sq, momentum_buffer, ...)
    <buffer>|buffer        a buffer of the model that is saved with it

A file is written and hashed by a thread while the next one is gathered.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MANIFEST = "elastic.json"
FORMAT = 2
FILE_BYTES = 1 << 26  # a file is closed when it is this long
MANIFEST_BYTES = 1 << 28  # the longest manifest that is read
BLOCK = 1 << 20  # bytes hashed at a time
REMEDY = "Resume from an older checkpoint."
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_FILE_NAME = re.compile(r"\d{5,}\.safetensors")


class TensorFiles:
    """Writes tensors into numbered files of a folder. At most two files' tensors are in memory.

    The first failure is kept and raised by `close`, so that the processes that gather are not left alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, str] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._number = 0
        self._failure: Exception | None = None

    def add(self, key: str, tensor: Tensor) -> None:
        """Takes a tensor, which must not change afterwards."""
        if self._failure is not None:
            return
        self._tensors[key] = tensor
        self.where[key] = f"{self._number:05d}.safetensors"
        if sum(t.nbytes for t in self._tensors.values()) >= FILE_BYTES:
            self.end_file()

    def close(self) -> dict[str, dict[str, Any]]:
        """Waits until all is on disk.

        Returns:
            {file: {"size": bytes, "sha256": hex digest}}.

        Raises:
            OSError: a file could not be written.
        """
        self.end_file()
        self._wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise self._failure
        return self.files

    def end_file(self) -> None:
        """What comes next goes into another file."""
        self._wait()
        if self._tensors and self._failure is None:
            name = f"{self._number:05d}.safetensors"
            self._written = self._thread.submit(self._write, name, self._tensors)
            self._tensors, self._number = {}, self._number + 1

    def _wait(self) -> None:
        if self._written is None:
            return
        error = self._written.exception()
        self._written = None
        if isinstance(error, Exception) and self._failure is None:
            self._failure = error

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        data = save(tensors, metadata={"format": "pt"})
        with (self.folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_flushed(path: Path, text: str) -> None:
    """Writes a file so that it survives a power cut."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `elastic.json`, with a hash of all that it says."""
    write_flushed(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))


def _digest(manifest: dict[str, Any]) -> str:
    """The hash of a manifest's content but for the hash itself; that of what JSON makes of it."""
    rest = json.loads(json.dumps({name: value for name, value in manifest.items() if name != "sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def publish(partial: Path, folder: Path) -> None:
    """Renames a folder of complete files to its place; an older one of that name goes when the new one is there."""
    older = folder.with_name(f".{folder.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)  # until the new one has its place: a killed process loses neither
    partial.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The description of an elastic checkpoint whose files are all there, in full length.

    Raises:
        ValueError: naming the file, and what is missing or malformed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; {MANIFEST_BYTES:,} are read at most.")
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no elastic checkpoint: it has no {MANIFEST}. {REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). {REMEDY}") from error
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r:.40}; this version reads {FORMAT}.")
    fault = _fault(manifest)
    if fault is None and manifest.get("sha256") != _digest(manifest):
        fault = "it has changed since it was saved (its SHA-256 is another)"
    if fault is not None:
        raise ValueError(f"{path} is damaged: {fault}. {REMEDY}")
    for name, file in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != file["size"]:
            raise ValueError(f"{folder / name} is incomplete: {found} of {file['size']} bytes. {REMEDY}")
    return manifest


def check_contents(folder: str | Path, manifest: dict[str, Any], share: tuple[int, int] = (0, 1)) -> None:
    """Compares the files with their hashes, and the tensors in them with the manifest.

    Args:
        manifest: of `read_manifest`.
        share: (number, count) of the processes that share the work.

    Raises:
        ValueError: naming the file.
    """
    folder, (number, count) = Path(folder), share
    wanted: dict[str, dict[str, list[int]]] = {name: {} for name in manifest["files"]}
    for name, entry in manifest["parameters"].items():
        for key, place in entry["tensors"].items():
            wanted[place["file"]][f"{name}|{key}"] = place["shape"]
    for name, place in manifest["buffers"].items():
        wanted[place["file"]][f"{name}|buffer"] = place["shape"]
    for name in sorted(wanted)[number::count]:
        path = folder / name
        if sha256(path) != manifest["files"][name]["sha256"]:
            raise ValueError(f"{path} has changed since it was saved (its SHA-256 is another). {REMEDY}")
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). {REMEDY}") from error
        if found != wanted[name]:
            odd = sorted({*found} ^ {*wanted[name]} or {k for k in found if found[k] != wanted[name][k]})
            raise ValueError(f"{path} does not hold what {MANIFEST} says ({', '.join(odd[:3])}). {REMEDY}")


def _fault(manifest: Any) -> str | None:
    """What is wrong with a manifest's structure; None: nothing."""
    kinds = {"files": dict, "parameters": dict, "buffers": dict, "run": dict, "topology": dict, "record": dict,
             "optimizer": str, "train_batch_size": int}  # fmt: skip
    if not isinstance(manifest, dict):
        return f"it holds a JSON {type(manifest).__name__}, not an object"
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            return f"{name!r} is missing or no {kind.__name__}"
    files = manifest["files"]
    for name, file in files.items():
        if not _FILE_NAME.fullmatch(name):
            return f"{name!r:.60} is no file name of a checkpoint"
        if not (isinstance(file, dict) and _count(file.get("size")) and isinstance(file.get("sha256"), str)):
            return f"the entry of {name} lacks size or sha256"
    for name, entry in manifest["parameters"].items():
        if not isinstance(entry, dict) or not _shape(entry.get("shape")):
            return f"{name} has no shape"
        if not isinstance(entry.get("tensors"), dict) or "weight" not in entry["tensors"]:
            return f"{name} has no weight"
        if not all(_place(place, files) for place in entry["tensors"].values()):
            return f"{name} lies in a file that is not listed"
        if not _number(entry.get("lr")) or not _number(entry.get("base_lr")):
            return f"{name} has no learning rate"
        numbers = entry.get("numbers")
        if not isinstance(numbers, dict) or not all(
            isinstance(n, dict) and _number(n.get("value")) and isinstance(n.get("tensor"), bool)
            for n in numbers.values()
        ):
            return f"{name} has malformed numbers"
    if not all(_place(place, files) for place in manifest["buffers"].values()):
        return "a buffer lies in a file that is not listed"
    run = manifest["run"]
    counters, scheduler, scale = run.get("counters"), run.get("scheduler"), run.get("loss_scale")
    if not isinstance(counters, dict) or not all(_count(value) for value in counters.values()):
        return "the run's counters are no numbers of steps"
    if not isinstance(scheduler, dict | None) or not isinstance(scale, dict | None):
        return "the run's scheduler or loss scale is malformed"
    if any(isinstance(value, list | dict) for value in [*(scheduler or {}).values(), *(scale or {}).values()]):
        return "the run's scheduler or loss scale holds more than numbers"
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and all(_count(size) for size in value)


def _place(place: Any, files: dict[str, Any]) -> bool:
    return isinstance(place, dict) and place.get("file") in files and _shape(place.get("shape"))
