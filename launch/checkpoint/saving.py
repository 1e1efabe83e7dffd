"""Checkpoints of a run: written as a whole or not at all, in one format, and resumed from.

    checkpoint-N/
        adapter_model.safetensors, adapter_config.json, tokenizer    for inference, as PEFT saves them
        00000.safetensors, ...    weights and optimizer state, by parameter
        random.json               the random states of every process
        trainer_state.json
        elastic.json              what is in the tensors' files, the record, sizes and hashes of all files; written last

So a checkpoint is an elastic one (`ds_moelora.checkpoint.elastic`) with further files. It is written into
`<output_dir>/.partial/` and then renamed to its place. So a folder called `checkpoint-N` is complete, and older ones
are deleted only when a newer one is.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ds_moelora.checkpoint.elastic import check_state, gather_weights, restore_state, why_not_elastic, write_state
from ds_moelora.checkpoint.manifest import flush, publish, write_manifest
from ds_moelora.checkpoint.processes import NotFiniteError, everyone, is_agreed, rank
from ds_moelora.checkpoint.trained import Run
from ds_moelora.optimizer.sharding.zero import configured_optimizer, is_partitioned
from ds_moelora.tuner import sharded_experts, without_card
from launch.checkpoint.record import TABLE, data_record
from launch.checkpoint.resume import PARTIAL, checkpoints, newest_complete, step_of
from launch.checkpoint.stopping import EvaluationSkipped, Stopping, ignore_signals
from launch.checks.errors import UserError

RANDOM = "random.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SCARCE = 1 << 26  # bytes free, below which a failed write is put down to the disk
# Methods of transformers' Trainer that are replaced though they are private, with the parameters they must have.
PRIVATE = {
    "_save_checkpoint": ["self", "model", "trial"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_load_best_model": ["self"],
    "_load_rng_state": ["self", "checkpoint"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_run_epoch": None,  # its arguments are handed on
}


class CheckpointedTrainer(Trainer):
    """A Trainer with this launcher's checkpoints, which stops in time and watches its losses.

    Args:
        settings: `launch.checkpoint.record.settings` of the run.
        stopping: what watches signals and losses; None: nothing does.
    """

    def __init__(self, *args: Any, settings: dict[str, Any], stopping: Stopping | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.stopping = settings, stopping
        if stopping is not None:
            self.add_callback(stopping)
        self.evaluation_skipped = False
        # Deleting is `rotate`'s alone: transformers deletes before a newer checkpoint is complete.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """transformers' own; the loss is watched."""
        loss = super().training_step(*args, **kwargs)
        if self.stopping is not None:
            self.stopping.see(loss)
        return loss

    def get_train_dataloader(self) -> DataLoader:
        """transformers' own; its workers leave signals to their process."""
        return _ignoring_signals(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As `get_train_dataloader`; rows that are evaluated are never dropped, whatever training does."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return _ignoring_signals(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drop

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' own; {} if a signal ended it, which ends training, too."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationSkipped:
            assert self.stopping is not None
            self.evaluation_skipped, self.control.should_evaluate = True, False
            if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
                self.stopping.preempted = self.control.should_training_stop = self.control.should_save = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Without scores, of an evaluation that a signal ended, this is whether the state is saved.
        return super()._determine_best_metric(metrics, trial) if metrics else self.control.should_save

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's card with the adapter's part (`ds_moelora.tuner.files.card`), not those of transformers and TRL."""
        if self.is_world_process_zero():
            self.accelerator.unwrap_model(self.model).create_or_update_model_card(self.args.output_dir)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last checkpoint of a run that was finished, or nearly: transformers would do one more
            # step before it looks.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone. Its files replace older ones when all of them are written; a collective call.

        Raises:
            UserError: its weights are not finite, or the disk is full.
        """
        target = Path(output_dir or self.args.output_dir)
        folder = target / PARTIAL / "model"

        def write() -> None:
            self._write_adapter(folder, gather_weights(self.as_run()))
            for path in sorted(folder.rglob("*")) if self.is_world_process_zero() else []:
                if path.is_file():
                    flush(path)
                    place = target / path.relative_to(folder)
                    place.parent.mkdir(exist_ok=True)
                    path.replace(place)

        self._save_safely(folder, target, write)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.stopping is not None and not self.stopping.last_step_was_finite():
            # The weights may be finite all the same: a step whose gradients are not is left out.
            if self.is_world_process_zero():
                print(f"Step {self.state.global_step} is not saved: its loss is not finite.", flush=True)
            return
        run_dir = Path(self.args.output_dir)
        final = run_dir / f"checkpoint-{self.state.global_step}"
        folder = run_dir / PARTIAL / final.name

        def write() -> None:
            self.store_flos()
            states, manifest, run = everyone(random_states()), {}, self.as_run()
            if self.args.save_only_model:
                weights = gather_weights(run)
            else:
                manifest, weights = write_state(run, folder, self.settings)
            self._write_adapter(folder, weights)
            if self.is_world_process_zero():
                (folder / RANDOM).write_text(json.dumps(states))
                self._write_trainer_state(folder, final)
                write_manifest(folder, manifest)
                publish(folder, final)
                rotate(final, self.save_total_limit, self.state.best_model_checkpoint)

        self._save_safely(folder, run_dir, write)

    def _save_safely(self, folder: Path, run_dir: Path, write: Callable[[], None]) -> None:
        """Makes a folder and fills it on every process; what went wrong on one is raised on all.

        `write` may fail on process 0 alone after its last collective call only. Where another process fails alone, the
        others are in the midst of collective calls: it ends at once, and the watchdog tells them.
        """
        failure: Exception | None = None
        try:
            if self.is_world_process_zero():
                shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)
                folder.mkdir(parents=True)
        except OSError as error:
            failure = error
        if not any(everyone(failure is not None)):
            try:
                write()
                if self.is_world_process_zero():
                    shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)
            except (OSError, RuntimeError, ValueError, SafetensorError) as error:
                if not self.is_world_process_zero() and not is_agreed(error):
                    raise
                failure = error
        step = self.state.global_step
        found = next(filter(None, everyone(failure and _save_error(folder, run_dir, failure, step))), None)
        if found is not None:
            raise found from failure

    def _write_adapter(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """What PEFT saves, from the trained weights, and the tokenizer; a collective call, process 0 writes.

        The card is left out: `launch/train.py` writes it once, when the scores are known.
        """
        model: PeftModel = self.accelerator.unwrap_model(self.model)
        weights = {**weights, **_sharded_starts(model)}
        if not self.is_world_process_zero():
            return
        entries = {
            name: value.detach()
            for name, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not is_partitioned(value)
        }
        with without_card(model):
            model.save_pretrained(str(folder), state_dict={**entries, **weights}, is_main_process=True)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _write_trainer_state(self, folder: Path, final: Path) -> None:
        """trainer_state.json, with the states of callbacks, and the best checkpoint under its final name."""
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                kept = self.state.stateful_callbacks.get(type(part).__name__)
                if isinstance(kept, list):
                    kept.append(part.state())
                else:
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    # -- resuming -----------------------------------------------------------------------------------------------------

    def as_run(self) -> Run:
        """Model, optimizer and scheduler, as checkpoints see them."""
        if self.is_deepspeed_enabled:
            # Where the engine has no scheduler, it is this trainer's; otherwise accelerate's wrapper stands here.
            own = self.lr_scheduler if isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LRScheduler) else None
            return Run.of(self.deepspeed, None if self.deepspeed.lr_scheduler is not None else own)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return Run(
            module=self.accelerator.unwrap_model(self.model),
            wrapper=optimizer,
            optimizer=optimizer,
            scheduler=self.lr_scheduler,
            device=self.args.device,
            scaler=self.accelerator.scaler,
        )

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # the engine exists from here on
        strategy = str(getattr(self.args.save_strategy, "value", self.args.save_strategy))
        obstacle = why_not_elastic(self.as_run())
        if obstacle and (resume_from_checkpoint or (strategy != "no" and not self.args.save_only_model)):
            raise UserError(
                f"this run cannot write or read checkpoints: {obstacle} Or pass --save_strategy no (the adapter is "
                "saved at the end), or --save_only_model."
            )
        self.settings |= everyone(data_record(self.train_dataset) if self.is_world_process_zero() else None)[0]
        if self.is_deepspeed_enabled and self.is_world_process_zero():
            say_optimizer(self.deepspeed)
        if resume_from_checkpoint is not None:
            self._restore(resume_from_checkpoint, "--resume_from_checkpoint", contents=False)  # hashed when chosen
        return prepared

    def _restore(self, checkpoint: str, flag: str, contents: bool) -> None:
        """Compares the checkpoint's record with this run, says what differs, and loads."""
        run, folder = self.as_run(), Path(checkpoint)
        try:
            manifest, lines = check_state(run, folder, self.settings, TABLE, contents)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from error
        for line in lines if self.is_world_process_zero() else []:
            print(line, flush=True)
        restore_state(run, folder, manifest)

    def _load_best_model(self) -> None:
        if self.args.save_only_model:
            super()._load_best_model()
        else:
            self._restore(self.state.best_model_checkpoint, "--load_best_model_at_end", contents=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = json.loads((Path(checkpoint) / RANDOM).read_text())
        if self.args.process_index < len(states):  # further processes keep the states of their seeds
            set_random_states(states[self.args.process_index])


def say_optimizer(engine: Any) -> None:
    """Prints which class runs, if DeepSpeed has its own for the name in the config ("AdamW": FusedAdam or CPUAdam).

    That another optimizer runs in place of one of the package's is refused by the engine itself
    (`ds_moelora.optimizer.guard`).
    """
    wanted, running = configured_optimizer(engine), type(engine.basic_optimizer)
    if wanted is not None and wanted.lower() != running.__name__.lower():
        print(f"Optimizer: {wanted} is {running.__module__}.{running.__name__} here.", flush=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond `save_total_limit`, but never the one just saved, or the best."""
    if not limit or limit < 1:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    others = [path for path in checkpoints(newest.parent) if path.name not in kept]
    # Steps beyond this one are left from before: damaged, or of another course.
    others.sort(key=lambda path: (step_of(path) < step_of(newest), step_of(path)), reverse=True)
    for path in others[max(limit - len(kept), 0) :]:
        doomed = newest.parent / PARTIAL / path.name
        path.rename(doomed)  # a process killed in the midst of deleting leaves no half checkpoint behind
        shutil.rmtree(doomed, ignore_errors=True)


def random_states() -> dict[str, Any]:
    """The states of this process's random generators, fit for JSON."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.random.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.accelerator.is_available():
        states["device"] = torch.get_device_module().get_rng_state().numpy().tobytes().hex()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """The reverse of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(_bytes(states["torch"]))
    if "device" in states and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(_bytes(states["device"]))


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state, f"started {os.getpid()} {socket.gethostname()}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
    if rank() == 0:
        token.mkdir(parents=True, exist_ok=True)
    everyone(None)  # no rank looks before it is there
    if Path(output_dir).is_dir():
        os.listdir(output_dir)  # refreshes what NFS remembers
    blind = list(filter(None, everyone(None if token.is_dir() else f"rank {rank()} on {socket.gethostname()}")))
    if rank() == 0:
        shutil.rmtree(token.parent)
    if blind:
        raise UserError(
            f"--output_dir {output_dir}: what rank 0 writes there is not seen by {', '.join(blind)}. Checkpoints need "
            "one folder that all hosts share; without one, pass --save_strategy no."
        )


def _ignoring_signals(loader: DataLoader) -> DataLoader:
    """A loader whose workers leave signals to their process."""
    reader = getattr(loader, "base_dataloader", loader)  # the one that starts workers inside accelerate's wrapper
    reader.worker_init_fn = partial(ignore_signals, reader.worker_init_fn)
    return loader


def _sharded_starts(model: PeftModel) -> dict[str, Tensor]:
    """A start from singular values, whole, of experts that are spread over processes; a collective call."""
    found = {}
    for name, module in sharded_experts(model).items():
        for factor in module.factor_names():
            whole = module.experts_shard().gather(factor) if factor.startswith("initial_") else None
            if whole is not None:
                found[f"{name}.{factor}"] = whole
    return found


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _save_error(partial: Path, run_dir: Path, error: Exception, step: int) -> Exception:
    """What is raised on every process for a failure of one: what remains, and what to do."""
    newest = newest_complete(run_dir)
    kept = f"{newest} is complete" if newest else "No checkpoint was saved before"
    if isinstance(error, NotFiniteError):
        return UserError(
            f"step {step}: {error} {kept}. Lower --learning_rate, or look at the rows of the steps since then."
        )
    free = shutil.disk_usage(run_dir).free
    text = f"{partial} could not be saved: {error} ({free:,} bytes are free there). {kept}."
    if free < SCARCE or (isinstance(error, OSError) and error.errno in FULL):
        return UserError(f"{text} Make room, and go on with --resume_from_checkpoint auto.")
    return RuntimeError(text)
