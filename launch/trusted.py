"""Nothing that a checkpoint or a model brings is executed, unless a flag says that it may be."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_pt_utils import safe_globals

from ds_moelora.parallel.data_only import check_data_only
from launch.arguments import Arguments
from launch.errors import UserError, process_rank


def check_trusted(arguments: Arguments) -> None:
    """Looks for code in what will be loaded; every rank does, before any of them loads.

    Raises:
        UserError: naming the file, and the flag that would accept it if there is one.
    """
    _check_checkpoint(arguments)
    _check_model(arguments.run.model_name_or_path)


def _check_checkpoint(arguments: Arguments) -> None:
    folder = arguments.training.resume_from_checkpoint
    if folder is None:
        return
    if arguments.run.unsafe_checkpoints:
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


def _check_model(name: str | None) -> None:
    """Weights in torch's format, which transformers and PEFT read where there are no safetensors."""
    folder = Path(name or "")
    if name is None or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    try:
        check_data_only(folder)
    except ValueError as error:
        raise UserError(f"--model_name_or_path: {error} Use a model with safetensors.") from error
