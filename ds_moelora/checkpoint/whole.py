"""Is a checkpoint whole? Some damage shows only half-way through loading, in an error that names no file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .manifest import check_manifest, has_manifest


def check_checkpoint(folder: str | Path) -> None:
    """Checks that every file of a checkpoint folder is complete, without loading tensors or unpickling anything.

    Compares the files with the sizes in the folder's manifest, if it has one (`ds_moelora.checkpoint.manifest`; hashes
    are for `check_manifest`). Reads the tables at the end of torch's files and at the head of safetensors files, which
    a save that was killed, or a disk that was full, cannot have left behind; parses JSON; and follows DeepSpeed's
    `latest`. Without a manifest, files of other ranks that are missing altogether are named by DeepSpeed itself.

    Args:
        folder: a DeepSpeed checkpoint folder (with `latest`), one of its tags, or a Trainer's `checkpoint-N`.

    Raises:
        ValueError: naming the file, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the path of a checkpoint that was saved.")
    for latest in sorted(folder.glob("latest*")):
        if latest.is_file() and not (folder / latest.read_text().strip()).is_dir():
            raise ValueError(f"{latest} names {latest.read_text().strip()!r}, which is not there. {REMEDY}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if not files:
        raise ValueError(f"{folder} is empty. {REMEDY}")
    fault = check_manifest(folder) if has_manifest(folder) else None
    if fault:
        raise ValueError(f"{fault}. {REMEDY}")
    for path in files:
        fault = _fault(path)
        if fault:
            raise ValueError(f"{path} is incomplete ({fault}). {REMEDY}")


REMEDY = "The save was probably interrupted: resume from the checkpoint before it."


def _fault(path: Path) -> str | None:
    """What is wrong with a file, by its kind; None if nothing is seen."""
    if path.stat().st_size == 0 and path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".json"):
        return "it is empty"
    if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        return f"{path.stat().st_size} bytes, without the table that ends a file of torch.save"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            return str(error)
    if path.suffix == ".json":
        try:
            json.loads(path.read_text())
        except ValueError as error:
            return str(error)
    return None
