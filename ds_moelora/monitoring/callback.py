"""TensorBoard through transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from .descriptions import add_scalar
from .heat_map import write_heat_map
from .meter import Report, TrainingMeter
from .run_info import write_run_info

SETTINGS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "world_size")


class MoELoRACallback(TrainerCallback):
    """Writes what a mixture and its optimizer do beside the Trainer's own curves, into the same TensorBoard run.

        trainer = Trainer(model, TrainingArguments(report_to="tensorboard", ...), ...)
        trainer.add_callback(MoELoRACallback(trainer))

    Scalars (`monitoring.TAGS`; docs/tensorboard.md has the formulas) on the steps that the Trainer logs by
    `logging_steps` and `logging_first_step`, and on the last one; in the first and then every `heat_map_every`-th of
    them a layers x experts heat map of the loads; hyperparameters and configuration when training begins.

    Args:
        trainer: reports to TensorBoard; the callback belongs to it.
        heat_map_every: reports from one heat map to the next; 0: none.
        on_report: gets every `monitoring.meter.Report` at the end of its step; TensorBoard is optional then.

    Raises:
        ValueError: the trainer does not report to TensorBoard, and nobody else is told.
    """

    def __init__(
        self, trainer: Trainer, heat_map_every: int = 5, on_report: Callable[[Report], None] | None = None
    ) -> None:
        self.trainer, self.heat_map_every, self.on_report = trainer, heat_map_every, on_report
        if heat_map_every < 0:
            raise ValueError(f"heat_map_every={heat_map_every} must be at least 0; 0 draws no heat map.")
        if on_report is None and self._tensorboard() is None:
            raise ValueError(
                f"this Trainer reports to {trainer.args.report_to or 'nothing'}; add "
                'report_to="tensorboard" to its TrainingArguments.'
            )
        self.meter: TrainingMeter | None = None

    def _tensorboard(self) -> TensorBoardCallback | None:
        callbacks = self.trainer.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, TensorBoardCallback)), None)

    def _writer(self) -> Any:
        """TensorBoard's, once training has begun; None without it, and on all processes but the first."""
        return getattr(self._tensorboard(), "tb_writer", None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        engine, model = self.trainer.deepspeed, self.trainer.model
        optimizer = engine or self.trainer.optimizer
        self.meter = TrainingMeter(model, optimizer)
        if self._writer() is not None:
            extra = {"max_steps": state.max_steps, **{name: getattr(args, name) for name in SETTINGS}}
            write_run_info(self._writer(), model, optimizer, engine, extra)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if self.meter is not None and (
            step % state.logging_steps == 0 or step == state.max_steps or (step == 1 and args.logging_first_step)
        ):  # the number alone decides, on every rank alike
            self.meter.arm()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        report = self.meter.step_done() if self.meter is not None else None
        if report is not None:
            if self.on_report is not None:
                self.on_report(report)
            if (writer := self._writer()) is not None:
                for tag, value in report.scalars.items():
                    add_scalar(writer, tag, value, state.global_step)
                write_heat_map(writer, report, state.global_step, self.heat_map_every)

    def _leave_out(self, *args: Any, **kwargs: Any) -> None:
        """What has passed since the last step is not training."""
        if self.meter is not None:
            self.meter.restart_clock()

    on_evaluate = on_save = on_epoch_begin = _leave_out

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.meter is not None:
            self.meter.close()
            self.meter = None
