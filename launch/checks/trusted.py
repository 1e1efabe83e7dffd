"""Nothing that a checkpoint or a model brings is executed, unless a flag says that it may be."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import CONFIG_MAPPING
from transformers.trainer_pt_utils import safe_globals

from ds_moelora.checkpoint.data_only import check_data_only
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError, process_rank
from launch.checks.flags import AUTO


def check_trusted(arguments: Arguments) -> None:
    """Looks for code in what will be loaded; every rank does, before any of them loads.

    Raises:
        UserError: naming the file, and the flag that would accept it if there is one.
    """
    check_trusted_checkpoint(arguments.training.resume_from_checkpoint, arguments.run.unsafe_checkpoints)
    name = arguments.run.model_name_or_path
    if name is not None and os.path.isdir(name):
        _check_model(Path(name), arguments.training.trust_remote_code)


def check_trusted_checkpoint(folder: str | None, unsafe: bool) -> None:
    """The part of `check_trusted` that concerns checkpoints. None and AUTO (not chosen yet) are no folders.

    Raises:
        UserError: naming the file.
    """
    if folder is None or folder == AUTO:
        return
    if unsafe:
        if process_rank()[0] == 0:
            print(f"WARNING: --unsafe_checkpoints: whatever code is in {folder} will be run.", flush=True)
        return
    try:
        with safe_globals():  # the state of numpy's random generator
            check_data_only(folder)
    except ValueError as error:
        raise UserError(
            f"--resume_from_checkpoint: {error} Somebody may have changed that file. If you wrote it yourself, with "
            "objects of your own in it, pass --unsafe_checkpoints."
        ) from error


def _check_model(folder: Path, trusted: bool) -> None:
    """Code of the model's own, and weights in torch's format, which are read where there are no safetensors."""
    if not trusted and (code := _own_code(folder)):
        raise UserError(
            f"--model_name_or_path {folder} is a model that transformers does not know, with code of its own "
            f"({code}), which is not run unasked. Read that code, and pass --trust_remote_code if you trust it."
        )
    if any(folder.glob("*.safetensors")):
        return
    try:
        check_data_only(folder)
    except ValueError as error:
        raise UserError(f"--model_name_or_path: {error} Use a model with safetensors.") from error


def _own_code(folder: Path) -> str | None:
    """Where a model's config takes its class from, if transformers has none for it."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None  # said by transformers
    if not isinstance(config, dict) or "auto_map" not in config or config.get("model_type") in CONFIG_MAPPING:
        return None
    return str(config["auto_map"])
