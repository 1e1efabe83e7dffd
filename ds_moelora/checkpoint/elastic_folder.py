"""The folder of an elastic checkpoint: complete, or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "elastic.json"
FORMAT = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """The description of an elastic checkpoint whose files are all there, in full length.

    Raises:
        ValueError: naming what is missing.
    """
    path = folder / MANIFEST
    remedy = "Resume from an older checkpoint."
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no elastic checkpoint: it has no {MANIFEST}. {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}; this version reads {FORMAT}.")
    for name, size in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise ValueError(f"{folder / name} is incomplete: {found} of {size} bytes. {remedy}")
    return manifest


def try_to_write(path: Path, tensors: dict[str, Tensor], module: str) -> str | None:
    """Writes one module's tensors; what went wrong, or None."""
    try:
        save_file(tensors, path, metadata={"module": module, "format": "pt"})
    except Exception as error:  # told to every rank by _agree
        return f"{type(error).__name__}: {error}"
    return None


def try_to_publish(partial: Path, folder: Path, manifest: dict[str, Any]) -> str | None:
    """Adds the manifest to a folder of complete files and puts it in its place; what went wrong, or None."""
    try:
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        with (partial / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        older = folder.with_name(f".{folder.name}.older")
        shutil.rmtree(older, ignore_errors=True)
        if folder.exists():
            folder.rename(older)  # until the new one has its place: a killed process loses neither
        partial.rename(folder)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None
