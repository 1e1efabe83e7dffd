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

from ds_moelora.checkpoint.manifest import check_contents, read_manifest
from ds_moelora.checkpoint.processes import everyone, rank, world_size
from ds_moelora.checkpoint.record import refuse_others
from launch.checkpoint.lock import NAME as LOCK
from launch.checkpoint.record import before_loading
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import AUTO

PARTIAL = ".partial"  # folder inside the output folder in which checkpoints are written
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


def newest_complete(output_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files are all there, in full length; they are not hashed."""
    return next((path for path in checkpoints(output_dir) if fault(path, resumable=False) is None), None)


def fault(checkpoint: str | Path, resumable: bool = True, share: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a checkpoint: a sentence that names the file; None: nothing.

    Args:
        resumable: whether it has to hold more than the adapter.
        share: (number, count) of the ranks that hash its files together; None: sizes alone are compared.
    """
    try:
        manifest = read_manifest(checkpoint)
        if share is not None:
            check_contents(checkpoint, manifest, share)
    except (ValueError, OSError) as error:
        return str(error)
    if resumable and "parameters" not in manifest:
        return (
            f"{checkpoint} holds the adapter alone, without optimizer state (--save_only_model). Resume from another "
            "checkpoint, or start a new run from that adapter."
        )
    return None


def check_output_dir(arguments: Arguments) -> None:
    """Settles where results go, and which checkpoint a flag names; writes nothing.

    `resume_from_checkpoint` is replaced by the path of a checkpoint, by AUTO (see `choose_checkpoint`), or by None.
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


def _meaning(wish: str | None, output_dir: Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; AUTO is left for later."""
    word = str(wish).lower()
    if word in ("false", "no", "none"):
        return None
    if word == AUTO:
        return AUTO
    found = checkpoints(output_dir)
    if word in ("true", "yes", "last"):
        if not found:
            raise UserError(f"--resume_from_checkpoint {wish}: {output_dir} has no checkpoint-* folder.")
        wish = str(found[0])
    elif not Path(str(wish)).is_dir():
        known = f"{output_dir} has: {', '.join(map(str, found[::-1]))}." if found else f"{output_dir} has none either."
        raise UserError(f"--resume_from_checkpoint {wish}: there is no checkpoint. {known}")
    wrong = fault(str(wish))
    if wrong:
        raise UserError(f"--resume_from_checkpoint: {wrong}")
    return wish


def choose_checkpoint(arguments: Arguments) -> None:
    """Settles on all ranks together which checkpoint is loaded; a collective call.

    `resume_from_checkpoint` is replaced by its path or None. AUTO means the newest complete checkpoint, or none; of
    others a line says why they are skipped.

    Raises:
        UserError: on every rank, if the checkpoint that was named is damaged.
    """
    training = arguments.training
    wish = training.resume_from_checkpoint
    if wish is None:
        return
    candidates = [str(path) for path in checkpoints(training.output_dir)] if wish == AUTO else [wish]
    for folder in everyone(candidates)[0]:  # rank 0's list: a network file system may show another to others
        found = next(filter(None, everyone(fault(folder, share=(rank(), world_size())))), None)
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
        refuse_others(before_loading(read_manifest(folder)["record"], arguments, config), str(folder))
    except ValueError as error:
        raise UserError(f"--resume_from_checkpoint: {error}") from error


def clear_partial(output_dir: str | Path) -> None:
    """Removes what an interrupted save has left; for one rank, before any saves."""
    partial = Path(output_dir) / PARTIAL
    for path in sorted(partial.glob("checkpoint-*")):
        print(f"{path} was not saved to its end, and is removed.", flush=True)
    shutil.rmtree(partial, ignore_errors=True)


def _say(training: Any, text: str) -> None:
    if training.process_index == 0:
        print(text, flush=True)
