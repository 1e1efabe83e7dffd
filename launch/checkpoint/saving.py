"""Saves that are there as a whole, or not at all.

A checkpoint is written into `<output_dir>/.partial/`, described by a manifest (`ds_moelora.checkpoint.manifest`) when
every rank has written its part, and then renamed to its place. So a folder called `checkpoint-N` is complete, and
older ones are deleted only when a newer one is.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ds_moelora.checkpoint.manifest import describe_files, files_in, write_manifest
from launch.checkpoint.resume import PARTIAL, checkpoints, everyone, newest_complete, step_of
from launch.checkpoint.stopping import Stopping
from launch.checks.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SCARCE = 1 << 26  # bytes free, below which a failed write is put down to the disk


class AtomicTrainer(Trainer):
    """A Trainer whose checkpoints appear when they are complete; `stopping` keeps broken weights out of them."""

    stopping: Stopping | None = None
    _writes_partial = False

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(Path(run_dir) / PARTIAL) if self._writes_partial else run_dir

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.stopping is not None and not self.stopping.last_step_was_finite(self._gradient_norm()):
            if self.is_world_process_zero():
                print(f"Step {self.state.global_step} is not saved: its loss or gradient is not finite.", flush=True)
            return
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial = run_dir / PARTIAL / name
        try:
            self._begin(run_dir)
            self._writes_partial = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writes_partial = False
            self._publish(partial, run_dir / name)
        except (OSError, RuntimeError) as error:
            raise _save_error(partial, run_dir, error) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone. Its files replace older ones when all of them are written."""
        if _internal_call:  # part of a checkpoint
            super().save_model(output_dir, _internal_call)
            return
        target = Path(output_dir or self.args.output_dir)
        partial = target / PARTIAL / "model"
        try:
            self._begin(target)
            super().save_model(str(partial), _internal_call=True)
            _barrier()
            if self.is_world_process_zero():
                describe_files(partial, files_in(partial))  # flushes them
                for name in sorted(files_in(partial)):
                    (target / name).parent.mkdir(exist_ok=True)
                    (partial / name).replace(target / name)
                shutil.rmtree(target / PARTIAL)
            _barrier()
        except (OSError, RuntimeError) as error:
            raise _save_error(partial, target, error) from error

    def _begin(self, folder: Path) -> None:
        if self.is_world_process_zero():
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        _barrier()

    def _publish(self, partial: Path, final: Path) -> None:
        """The manifest, the new name, and the end of checkpoints beyond `save_total_limit`."""
        if self.is_world_process_zero():
            self._correct_best(partial, final)
        _barrier()  # every rank has written everything
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Not one rank's list: a network file system may show it late what others have written.
        names = sorted(set().union(*everyone(files_in(partial))))
        shares = everyone(describe_files(partial, names[rank::world_size]))
        if rank == 0:
            write_manifest(partial, {name: entry for share in shares for name, entry in share.items()})
            if final.exists():  # damaged, or of a run that went on from an older one
                final.rename(final.parent / PARTIAL / f"replaced-{final.name}")
            partial.rename(final)
            _flush_folder(final.parent)
            self._rotate(final)
            shutil.rmtree(final.parent / PARTIAL, ignore_errors=True)
        _barrier()

    def _correct_best(self, partial: Path, final: Path) -> None:
        """transformers looked for the best checkpoint, and wrote down its path, where it is only being written."""
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))

    def _rotate(self, newest: Path) -> None:
        """Deletes the oldest checkpoints beyond `save_total_limit`, but never the one just saved, or the best."""
        limit = self.args.save_total_limit
        if not limit or limit < 1:
            return
        best = self.state.best_model_checkpoint
        kept = {newest.name} | ({Path(best).name} if best else set())
        others = [path for path in checkpoints(newest.parent) if path.name not in kept]
        # Steps beyond this one are left from before: damaged, or of another course.
        others.sort(key=lambda path: (step_of(path) < step_of(newest), step_of(path)), reverse=True)
        for path in others[max(limit - len(kept), 0) :]:
            doomed = newest.parent / PARTIAL / path.name
            path.rename(doomed)  # a process killed in the midst of deleting leaves no half checkpoint behind
            shutil.rmtree(doomed, ignore_errors=True)

    def _finalize_training(self, *args: Any) -> Any:
        # With save_total_limit=1, transformers deletes all checkpoints but the best here, even one that was saved a
        # moment ago because the run is being preempted.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _gradient_norm(self) -> float | None:
        """The last step's gradient norm, if one that is not finite has reached the weights."""
        if not self.is_deepspeed_enabled or self.deepspeed.fp16_enabled():  # fp16: such a step is left out
            return None
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)


class StatusFile(TrainerCallback):
    """Appends to a file how far the run has come, one line per event, for whoever restarts it (launch/supervise.sh).

        started <pid of rank 0> <its host>
        checkpoint <step>
        preempted <step>  |  finished <step>

    Args:
        path: the file; None: nothing is written.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.write(state, f"started {os.getpid()} {socket.gethostname()}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir():
            self.write(state, f"checkpoint {state.global_step}")

    def write(self, state: TrainerState, line: str) -> None:
        """Appends a line, on rank 0."""
        if self.path is not None and state.is_world_process_zero:
            with open(self.path, "a") as file:
                file.write(line + "\n")


def check_shared(output_dir: str | Path) -> None:
    """Makes sure that all ranks see rank 0's output folder, as every checkpoint needs; a collective call.

    Raises:
        UserError: on every rank, naming those that do not.
    """
    token = Path(output_dir) / PARTIAL / "seen-by-all"
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if dist.get_rank() == 0:
        token.mkdir(parents=True, exist_ok=True)
    _barrier()
    os.listdir(token.parent.parent if token.parent.parent.is_dir() else ".")  # refreshes what NFS remembers
    mine = None if token.is_dir() else f"rank {dist.get_rank()} on {socket.gethostname()}"
    blind = everyone(mine)
    if dist.get_rank() == 0:
        shutil.rmtree(token.parent)
    if any(blind):
        raise UserError(
            f"--output_dir {output_dir}: what rank 0 writes there is not seen by {', '.join(filter(None, blind))}. "
            "Checkpoints need one folder that all hosts share; without one, pass --save_strategy no."
        )


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_error(partial: Path, run_dir: Path, error: Exception) -> Exception:
    free = shutil.disk_usage(run_dir).free
    newest = newest_complete(run_dir)
    text = (
        f"{partial} could not be saved: {error} ({free:,} bytes are free there). "
        f"{f'{newest} is complete' if newest else 'No checkpoint was saved before'}."
    )
    if free < SCARCE or (isinstance(error, OSError) and error.errno in FULL):
        return UserError(f"{text} Make room, and go on with --resume_from_checkpoint auto.")
    return RuntimeError(text)
