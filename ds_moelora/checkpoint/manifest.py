"""An elastic checkpoint on disk: files of tensors, and `elastic.json`, written last, which describes them all.

    files         {relative path: {"size", "sha256"}} of every file of the folder
    tensors       {"<parameter>|weight", "<parameter>|<optimizer state>" or "<buffer>|buffer": file}
    parameters    {name: {"numbers": of the optimizer's, "lr", "base_lr"}}
    run           counters, scheduler, loss scale (`run_state`)
    record        what the run was (`record`)
    sha256        of all the above

The launcher keeps further files in the folder; a checkpoint of the adapter alone has `files` only. A folder without
`elastic.json` was not saved to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MANIFEST = "elastic.json"
FORMAT = 3
FILE_BYTES = 1 << 26  # a file is closed when it is this long
MANIFEST_BYTES = 1 << 28  # the longest manifest that is read
REMEDY = "Resume from an older checkpoint."
STATE = ("tensors", "parameters", "run", "record")  # what a checkpoint that can be resumed has


class TensorFiles:
    """Writes tensors into numbered files. A thread writes and hashes one file while the next one is gathered.

    At most two files' tensors are in memory. Failures are raised by `close` alone: the other processes are in
    collective calls until then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1)
        self._writes: list[Future[tuple[str, dict[str, Any]]]] = []
        self._tensors: dict[str, Tensor] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Takes a tensor, which must not change afterwards."""
        self._tensors[key] = tensor
        self.where[key] = f"{len(self._writes):05d}.safetensors"
        if sum(t.nbytes for t in self._tensors.values()) >= FILE_BYTES:
            self.end_file()

    def end_file(self) -> None:
        """What comes next goes into another file."""
        if self._writes:
            self._writes[-1].exception()  # waits
        if self._tensors:
            name = f"{len(self._writes):05d}.safetensors"
            self._writes.append(self._thread.submit(self._write, name, self._tensors))
            self._tensors = {}

    def close(self) -> dict[str, dict[str, Any]]:
        """Waits until all is on disk; returns the files' entries in the manifest.

        Raises:
            OSError: a file could not be written.
        """
        self.end_file()
        self._thread.shutdown()
        return dict(write.result() for write in self._writes)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
        data = save(tensors, metadata={"format": "pt"})
        (self.folder / name).write_bytes(data)
        flush(self.folder / name)
        return name, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def flush(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `elastic.json`, after it has flushed and hashed the files of the folder that `files` does not name yet.

    Raises:
        OSError: a file could not be read or written.
    """
    files = dict(manifest.get("files", {}))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (*files, MANIFEST):
            flush(path)
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    content = {**manifest, "format": FORMAT, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1))
    flush(folder / MANIFEST)


def publish(partial: Path, folder: Path) -> None:
    """Renames a folder of complete files to its place; an older one of that name goes when the new one is there."""
    older = partial.with_name(f"{partial.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)  # until the new one has its place: a killed process loses neither
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all there, in full length.

    Raises:
        ValueError: naming the file, and what is missing or malformed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes; {MANIFEST_BYTES:,} are read at most")
        manifest = json.loads(path.read_text())
        if isinstance(manifest, dict) and manifest.get("format") not in (FORMAT, None):
            raise ValueError(f"it has format {manifest['format']!r:.40}; this version reads {FORMAT}")
        if manifest["sha256"] != _digest(manifest):
            raise ValueError("it has changed since it was saved: its SHA-256 is another")
        _check_structure(manifest)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: it was not saved to its end, or by something else. {REMEDY}"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.200}). {REMEDY}") from error
    for name, file in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != file["size"]:
            raise ValueError(f"{folder / name} is incomplete: {found} of {file['size']} bytes. {REMEDY}")
    return manifest


def check_contents(folder: str | Path, manifest: dict[str, Any], share: tuple[int, int] = (0, 1)) -> None:
    """Compares files with their hashes, and the names of tensors with the manifest.

    Args:
        manifest: of `read_manifest`.
        share: (number, count) of the processes that share the work, at about 1 GB/s and core.

    Raises:
        ValueError: naming the file.
    """
    folder, (number, count) = Path(folder), share
    tensors = manifest.get("tensors", {})
    for name in sorted(manifest["files"])[number::count]:
        if _sha256(folder / name) != manifest["files"][name]["sha256"]:
            raise ValueError(f"{folder / name} has changed since it was saved: its SHA-256 is another. {REMEDY}")
        wanted = {key for key, file in tensors.items() if file == name}
        if not wanted:
            continue
        try:
            with safe_open(folder / name, framework="pt") as file:
                missing = wanted - {*file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged ({error}). {REMEDY}") from error
        if missing:
            raise ValueError(f"{folder / name} lacks {min(missing)}, which {MANIFEST} names. {REMEDY}")


def _check_structure(manifest: dict[str, Any]) -> None:
    """Reads every entry as what it has to be: a KeyError, TypeError or ValueError otherwise."""
    for name, file in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r:.60} is outside the folder")
        if int(file["size"]) < 0 or not isinstance(file["sha256"], str):
            raise ValueError(f"{name} has no size and hash")
    if not any(part in manifest for part in STATE):
        return
    for key, file in manifest["tensors"].items():
        if file not in manifest["files"]:
            raise ValueError(f"{key} lies in {file!r:.60}, which is not listed")
    for name, entry in manifest["parameters"].items():
        numbers = [entry["lr"], entry["base_lr"], *(number["value"] for number in entry["numbers"].values())]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{name} has {numbers!r:.60} for numbers")
        if f"{name}|weight" not in manifest["tensors"]:
            raise ValueError(f"{name} has no weight")
    run = manifest["run"]
    for part in (manifest["record"], run["counters"], run["scheduler"] or {}, run["loss_scale"] or {}):
        if not isinstance(part, dict):
            raise ValueError(f"{part!r:.60} is no object")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    """The hash of a manifest's content but for the hash itself."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
