"""A checkpoint's manifest: size and SHA-256 of every file, written last. A folder that has one was saved to its end.

Hashing is the one expensive part, at about 1 GB/s and core: each rank takes every n-th file, when saving and when
checking, so that n ranks need an n-th of the time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .state_folder import sha256, write_flushed

MANIFEST = "manifest.json"
FORMAT = 1


def files_in(folder: str | Path) -> set[str]:
    """The relative paths of a checkpoint's files, the manifest left out."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}


def describe_files(folder: str | Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{relative path: {"size": bytes, "sha256": hex digest}}, all flushed to disk.

    Args:
        folder: a checkpoint that every rank has finished writing.
        names: the relative paths; of n ranks, each may take every n-th of `files_in`.

    Raises:
        OSError: a file could not be read or flushed.
    """
    folder = Path(folder)
    entries = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        entries[name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    return entries


def write_manifest(folder: str | Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest, flushed to disk; `files` is what `describe_files` gave, on all ranks together.

    Raises:
        OSError: it could not be written.
    """
    path = Path(folder) / MANIFEST
    partial = path.with_suffix(".partial")
    write_flushed(partial, json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1))
    partial.replace(path)


def has_manifest(folder: str | Path) -> bool:
    """Whether the folder has a manifest, whatever it says."""
    return (Path(folder) / MANIFEST).is_file()


def check_manifest(folder: str | Path, hashes: bool = False, rank: int = 0, world_size: int = 1) -> str | None:
    """What differs from the manifest: a sentence that names the file, or None.

    Args:
        folder: a checkpoint with a manifest.
        hashes: also hash this rank's share of the files; sizes alone tell a save that was cut short, hashes what a
            disk or a copy has changed.
        rank, world_size: the share: the files number `rank`, `rank + world_size`, ... in the order of their names.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error})"
    if manifest.get("format") != FORMAT:
        return f"{folder / MANIFEST} has format {manifest.get('format')}; this version reads {FORMAT}"
    for name, (size, _) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{folder / MANIFEST} names a file outside the checkpoint ({name!r:.80})"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is incomplete ({path.stat().st_size} bytes, its manifest says {size})"
    for name in sorted(files)[rank::world_size] if hashes else []:
        if sha256(folder / name) != files[name][1]:
            return f"{folder / name} has changed since it was saved (its SHA-256 is not that of the manifest)"
    return None
