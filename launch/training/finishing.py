"""What must not turn a run that is saved into a failure: TensorBoard's files, the summary, the upload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ds_moelora.monitoring.descriptions import add_scalar
from ds_moelora.redaction import redact_text
from launch.checkpoint.resume import step_of
from launch.checks.errors import UserError

# Folders and files of a run that are nobody else's: checkpoints, half-written files, pickled arguments.
NOT_UPLOADED = ["_*", ".*", ".partial/*", "checkpoint-*", "*.lock", "training_args.bin"]


@contextmanager
def not_fatal(what: str, output_dir: str | Path) -> Iterator[None]:
    """An error inside is one line that says what is missing; the run, which is saved, ends with code 0."""
    try:
        yield
    except Exception as error:
        print(f"The run is finished and saved in {output_dir}; {what} is missing: {_one_line(error)}", flush=True)


class EvaluateOnce(TrainerCallback):
    """Leaves the evaluation after the last step to `launch.train.run`, which saves the adapter first.

    Where the best checkpoint is to be found, the last step's scores are needed before.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = args.load_best_model_at_end or getattr(args.save_strategy, "value", args.save_strategy) == "best"
        if state.global_step >= state.max_steps and not best:
            control.should_evaluate = False

    on_epoch_end = on_step_end


def final_scores(trainer: Trainer) -> dict[str, float]:
    """The scores of the model that is left after training; {} without evaluation data.

    An error of one process's own run is no failure of it. Of several processes the others wait in the collective calls
    of the evaluation: there an error ends all of them, with a message.
    """
    if trainer.eval_dataset is None:
        return {}
    if found := _scores_in_log(trainer):
        return found
    if trainer.args.world_size > 1:
        return trainer.evaluate()
    with not_fatal("its evaluation (launch/evaluate.py makes up for it)", trainer.args.output_dir):
        return trainer.evaluate()
    return {}


def _scores_in_log(trainer: Trainer) -> dict[str, float]:
    """The scores of the model that is left, if it has been evaluated already; {}: it has not."""
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else None
    entries = [entry for entry in state.log_history if entry.get("step") == (step or state.global_step)]
    scores = {k: v for entry in entries for k, v in entry.items() if k.startswith("eval_")}
    return scores if "eval_loss" in scores else {}


class Curves:
    """A `SummaryWriter` whose errors (a full disk) end the curves with one line, and not the training.

    Args:
        options: `SummaryWriter`'s.
    """

    def __init__(self, **options: Any) -> None:
        self._folder = options.get("log_dir")
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(**options)
        except OSError as error:
            self._give_up(error)

    @property
    def file_writer(self) -> Curves:
        """Whose `add_summary` is guarded as well."""
        return self

    def add_summary(self, *args: Any, **kwargs: Any) -> None:
        """Writes a protobuf summary."""
        self._call(lambda writer: writer.file_writer.add_summary(*args, **kwargs))

    def add_scalar(self, tag: str, value: float, step: int | None = None, **_: Any) -> None:
        """With what TensorBoard says about the curve."""
        self._call(lambda writer: add_scalar(writer, tag, value, step))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._call(lambda writer: getattr(writer, name)(*args, **kwargs))

    def _call(self, act: Any) -> Any:
        try:
            return None if self._writer is None else act(self._writer)
        except OSError as error:
            return self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        print(f"TensorBoard: {self._folder} cannot be written ({error}). Training goes on without curves.", flush=True)


def guard_curves(trainer: Trainer) -> None:
    """Makes transformers' TensorBoard callback write through `Curves`, after training, too.

    A resumed run goes on in the newest folder of the run, behind the step of its checkpoint: what the interrupted
    session wrote beyond that step is hidden.
    """
    resumed, used = trainer.args.resume_from_checkpoint, []

    def make(log_dir: str | None = None, **options: Any) -> Curves:
        earlier = sorted(Path(log_dir).parent.glob("*/events.out.tfevents*")) if log_dir and resumed else []
        if used:
            log_dir = used[0]
        elif earlier:
            log_dir = str(max(earlier, key=lambda file: file.stat().st_mtime).parent)
            options["purge_step"] = step_of(Path(resumed)) + 1
        used.append(log_dir)
        return Curves(log_dir=log_dir, **options)

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            if not hasattr(callback, "_SummaryWriter"):
                raise RuntimeError("transformers' TensorBoardCallback has no _SummaryWriter; version 5 has.")
            callback._SummaryWriter = make


class HubUpload(TrainerCallback):
    """Uploads what a run leaves, without pickled arguments, checkpoints and half-written files.

    transformers' own upload takes `training_args.bin`, in which the token is. So `--push_to_hub` is taken out of the
    training arguments, and done here: at the end, and with `--hub_strategy every_save` after each checkpoint.

    Args:
        training: the training arguments; `push_to_hub` is switched off in them.
    """

    def __init__(self, training: TrainingArguments) -> None:
        self.wanted, training.push_to_hub = bool(training.push_to_hub), False
        self.training = training
        self.repository: str | None = None
        self.every_save = str(getattr(training.hub_strategy, "value", training.hub_strategy)) != "end"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the repository first: a wrong token is found before training, not after."""
        if not self.wanted or not state.is_world_process_zero:
            return
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        try:
            made = self._api().create_repo(name, private=args.hub_private_repo, exist_ok=True)
        except Exception as error:
            raise UserError(f"--push_to_hub: {name} cannot be made on the hub: {_one_line(error)}") from error
        self.repository = made.repo_id

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.every_save and self.repository is not None and checkpoint.is_dir():
            with not_fatal(f"the upload of {checkpoint.name}", args.output_dir):
                self._upload(checkpoint, f"Step {state.global_step}", ["adapter_*", "*token*", "*.jinja"])

    def finish(self) -> None:
        """Uploads the finished run, on the rank that made the repository."""
        if self.repository is not None:
            with not_fatal(f"the upload to {self.repository}", self.training.output_dir):
                self._upload(Path(self.training.output_dir), "End of training", None)

    def _upload(self, folder: Path, message: str, allowed: list[str] | None) -> None:
        self._api().upload_folder(
            repo_id=self.repository,
            folder_path=folder,
            commit_message=message,
            revision=self.training.hub_revision,
            allow_patterns=allowed,
            ignore_patterns=NOT_UPLOADED,
        )

    def _api(self) -> HfApi:
        return HfApi(token=self.training.hub_token)


def _one_line(error: Exception) -> str:
    return redact_text(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
