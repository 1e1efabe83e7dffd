"""Nothing that a model brings is executed, unless a flag says that it may be."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import CONFIG_MAPPING

from ds_moelora.checkpoint.data_only import check_data_only
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError


def check_trusted(arguments: Arguments) -> None:
    """Looks for code in the model that will be loaded; checkpoints of this launcher are safetensors and JSON."""
    name = arguments.run.model_name_or_path
    if name is not None and os.path.isdir(name):
        _check_model(Path(name), arguments.training.trust_remote_code)


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
