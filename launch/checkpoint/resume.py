"""Which checkpoint a run goes on from.

Before torch.distributed opens, every rank looks alone at what `--resume_from_checkpoint` means. Once it is open,
`choose_checkpoint` has the ranks hash the files in shares and agree on one checkpoint: what one rank finds damaged, or
does not see, no rank loads.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ds_moelora.checkpoint.manifest import check_manifest, has_manifest
from ds_moelora.checkpoint.processes import everyone, rank, world_size
from ds_moelora.checkpoint.record import refuse_others
from ds_moelora.checkpoint.state_folder import read_manifest
from ds_moelora.checkpoint.whole import check_checkpoint
from launch.checkpoint.lock import NAME as LOCK
from launch.checkpoint.record import before_loading
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import AUTO

PARTIAL = ".partial"  # folder inside the output folder in which checkpoints are written
STATE = "state"  # folder of a checkpoint: what a run needs to go on
NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the newest (with the highest step) first, whether complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    match = NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def fault(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, by the sizes in its manifest and the insides of its files; None: it is."""
    if not (Path(checkpoint) / "trainer_state.json").is_file():
        return f"{checkpoint} has no trainer_state.json."
    if not has_manifest(checkpoint):
        return f"{checkpoint} has no manifest.json: it was not written to its end, or by something else."
    try:
        check_checkpoint(checkpoint)
    except ValueError as error:
        return str(error)
    return None


def without_state(checkpoint: str | Path) -> str | None:
    """Why a complete checkpoint cannot be resumed: it holds the adapter alone; None: it can."""
    if (Path(checkpoint) / STATE).is_dir():
        return None
    return (
        f"{checkpoint} holds the adapter alone, without optimizer state (--save_only_model). Resume from another "
        f"checkpoint, or start a new run from that adapter."
    )


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; files are not hashed."""
    return next((path for path in checkpoints(output_dir) if fault(path) is None), None)


def check_output_dir(arguments: Arguments) -> None:
    """Settles where results go, and which checkpoint a flag names; writes nothing.

    `resume_from_checkpoint` is replaced by the path of a checkpoint, by AUTO (see `choose_checkpoint`), or by None.

    Raises:
        UserError: a non-empty folder without resume or overwrite, or a checkpoint that is not there or not complete.
    """
    training = arguments.training
    output_dir = Path(training.output_dir)
    _check_place(output_dir)
    training.resume_from_checkpoint = _meaning(training.resume_from_checkpoint, output_dir)
    if training.resume_from_checkpoint is not None:
        if arguments.run.overwrite_output_dir:
            raise UserError("--overwrite_output_dir and --resume_from_checkpoint contradict each other; keep one.")
        return
    taken = output_dir.is_dir() and any(not path.name.startswith(LOCK) for path in output_dir.iterdir())
    if taken and not arguments.run.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} is not empty. Choose another folder, go on from its newest complete checkpoint "
            "with --resume_from_checkpoint auto, or write over it with --overwrite_output_dir."
        )


def _check_place(output_dir: Path) -> None:
    """Whether a folder is there, or can be made."""
    try:
        output_dir.exists()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error.strerror}; choose another name.") from error
    nearest = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--output_dir {output_dir}: {nearest} is a file; name a folder.")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {nearest} cannot be written to; choose another folder.")


def choose_checkpoint(arguments: Arguments) -> None:
    """Settles on all ranks together which checkpoint is loaded; a collective call.

    `resume_from_checkpoint` is replaced by its path or None. AUTO means the newest complete checkpoint, or none; others
    are passed over aloud.

    Raises:
        UserError: on every rank, if the checkpoint that was named is damaged.
    """
    training = arguments.training
    wish = training.resume_from_checkpoint
    if wish is None:
        return
    candidates = [str(path) for path in checkpoints(training.output_dir)] if wish == AUTO else [wish]
    for folder in everyone(candidates)[0]:  # rank 0's list: a network file system may show another to others
        found = next((text for text in everyone(_damage(folder)) if text), None)
        if found is None:
            if wish == AUTO:
                _say(training, f"--resume_from_checkpoint auto: going on from {folder}.")
            training.resume_from_checkpoint = folder
            return
        if wish != AUTO:
            raise UserError(f"--resume_from_checkpoint: {found}")
        _say(training, f"--resume_from_checkpoint auto: {folder} is passed over. {found}")
    _say(training, f"--resume_from_checkpoint auto: {training.output_dir} has no complete checkpoint: starting anew.")
    training.resume_from_checkpoint = None


def check_settings(arguments: Arguments, config: Any) -> None:
    """Compares the chosen checkpoint's record with flags and adapter configuration, before the model is loaded.

    Args:
        config: the run's `MoELoRAConfig`.

    Raises:
        UserError: on every rank; with both values of what cannot be meant.
    """
    folder = arguments.training.resume_from_checkpoint
    if folder is None:
        return
    try:
        saved = read_manifest(Path(folder) / STATE)["record"]
        refuse_others(before_loading(saved, arguments, config), str(folder))
    except ValueError as error:
        raise UserError(f"--resume_from_checkpoint: {error}") from error


def clear_partial(output_dir: str | Path) -> None:
    """Removes what an interrupted save has left; for one rank, before any saves."""
    partial = Path(output_dir) / PARTIAL
    for path in sorted(partial.glob("checkpoint-*")):
        print(f"{path} was not saved to its end, and is removed.", flush=True)
    shutil.rmtree(partial, ignore_errors=True)


def _meaning(wish: str | None, output_dir: Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; AUTO is left for later."""
    if wish is None or str(wish).lower() in ("false", "no", "none"):
        return None
    if str(wish).lower() == AUTO:
        return AUTO
    if str(wish).lower() in ("true", "yes", "last"):
        found = checkpoints(output_dir)
        if not found:
            raise UserError(f"--resume_from_checkpoint {wish}: {output_dir} has no checkpoint-* folder.")
        wish = str(found[0])
    elif not (Path(wish) / "trainer_state.json").is_file():
        here = ", ".join(str(path) for path in reversed(checkpoints(output_dir)))
        known = f" {output_dir} has: {here}." if here else f" {output_dir} has none either."
        raise UserError(f"--resume_from_checkpoint {wish}: there is no checkpoint (no trainer_state.json).{known}")
    found_fault = fault(wish) or without_state(wish)
    if found_fault:
        raise UserError(f"--resume_from_checkpoint: {found_fault}")
    return str(wish)


def _damage(folder: str) -> str | None:
    """What this rank finds wrong with a checkpoint, having hashed its share of the files."""
    found = fault(folder) or without_state(folder)
    return found or check_manifest(folder, hashes=True, rank=rank(), world_size=world_size())


def _say(training: Any, text: str) -> None:
    if training.process_index == 0:
        print(text, flush=True)
