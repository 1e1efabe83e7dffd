"""What a run says while it trains: a panel before the first step, then one line per report.

    step    40/100  loss 0.8127  lr 7.1e-04  1.31 s/step  ETA 1:18  1,402 tokens/s  load 1.62  dead 0 %  balance 1.04

In a pipe or a file a report is the dict that transformers prints, with the same entries added.

load: tokens of a layer's most used expert over an even share, mean over layers (1 is even, E / k is all of it). dead:
share of experts that no token chose. balance: the load-balancing loss (1 at perfect balance). docs/routers.md says what
to do about them. Seconds and tokens are those of training steps since the start or the resume; what evaluations and
saves take is left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.panel import Panel
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from ds_moelora.monitoring.meter import Report
from ds_moelora.tuner.layer import MoELoRALayer
from launch.checks.arguments import Arguments
from launch.checks.flags import LOGGING_STEPS
from launch.training.remembered import precision_of
from launch.training.report import NOT_SCORES, parameter_counts, terminal

REPORTS = 20  # at least so many lines, where there are as many steps
HEALTH = {
    "load": ("moe/load_max_over_ideal", "{:.2f}"),
    "dead": ("moe/dead_expert_fraction", "{:.0%}"),
    "balance": ("moe/aux_loss", "{:.2f}"),
}
OTHERS = ("num_input_tokens_seen", "train_runtime", "train_tokens_per_second")  # since the start, saves included


class Progress(TrainerCallback):
    """Prints, on the main process, and counts what this session has trained, on every process.

    Args:
        trainer: whose bars and dicts on the screen it replaces.
        record: of `launch.training.remembered.Remember`, complete when training begins.
    """

    def __init__(self, trainer: Trainer, arguments: Arguments, record: dict[str, Any]) -> None:
        self.trainer, self.arguments, self.record = trainer, arguments, record
        self.first_step = self.first_tokens = 0
        self.seconds, self.steps = 0.0, 0  # of this session
        self._mark, self._since = 0.0, (0.0, 0)
        self._health: dict[str, str] = {}
        for kind in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(kind)
        if sys.stderr.isatty() and not trainer.args.disable_tqdm:
            trainer.add_callback(_Bars())

    def tokens(self) -> int:
        """Read in this session."""
        return self.trainer.state.num_input_tokens_seen - self.first_tokens

    def take(self, report: Report) -> None:
        """What the meter found in the step that has just ended."""
        self._health = {
            name: text.format(report.scalars[tag]) for name, (tag, text) in HEALTH.items() if tag in report.scalars
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.reports_often:
            state.logging_steps = max(1, min(LOGGING_STEPS, state.max_steps // REPORTS))
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        if state.is_world_process_zero:
            panel = describe(self.trainer, self.arguments, self.record)
            terminal().print(Panel(panel, title="Training", title_align="left", expand=False))
        self._leave_out()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds, self.steps, self._mark = self.seconds + now - self._mark, self.steps + 1, now
        if state.global_step >= state.max_steps and getattr(args.logging_strategy, "value", "") != "no":
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not self.steps:
            return
        before, self._since = self._since, (self.seconds, self.steps)
        pace = (self.seconds - before[0]) / max(self.steps - before[1], 1)
        left = (state.max_steps - state.global_step) * self.seconds / self.steps
        width = len(str(state.max_steps))
        shown = {
            "step": f"{state.global_step:>{width}}/{state.max_steps}",
            "loss": f"{logs['loss']:.4f}",
            "lr": f"{logs['learning_rate']:.1e}",
            "s/step": f"{pace:.2f}",
            "ETA": clock(left),
        }
        if self.tokens():
            shown["tokens/s"] = f"{self.tokens() / self.seconds:,.0f}"
        self._say(state, line(shown | self._health, logs, sys.stdout.isatty()))
        self._health = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        scores, step = {k: v for k, v in metrics.items() if not k.endswith(NOT_SCORES)}, state.global_step
        shown = "  ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {v:.4f}" for k, v in scores.items())
        shown = f"step {step}/{state.max_steps}  evaluation: {shown}"
        self._say(state, shown if sys.stdout.isatty() else dictionary(scores, {"step": f"{step}/{state.max_steps}"}))
        self._leave_out()

    def _leave_out(self, *_: Any, **kwargs: Any) -> None:
        """What has passed since the last step is not training."""
        self._mark = time.perf_counter()

    on_save = on_epoch_begin = _leave_out

    def _say(self, state: TrainerState, line: str) -> None:
        if state.is_world_process_zero:
            with tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)


class _Bars(ProgressCallback):
    """transformers' bars, for a terminal; the lines are `Progress`'s."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def line(shown: dict[str, str], logs: dict[str, Any], terminal: bool) -> str:
    """A report: for people; in a pipe or a file as `{'loss': '0.8127', ...}`, for programs that read transformers'."""
    if not terminal:
        return dictionary(logs, {name: text.strip() for name, text in shown.items() if name not in ("loss", "lr")})
    after = ("s/step", "tokens/s")
    return "  ".join(f"{text} {name}" if name in after else f"{name} {text}" for name, text in shown.items())


def dictionary(logs: dict[str, Any], more: dict[str, str]) -> str:
    """transformers' line, with more entries."""
    theirs = {name: value for name, value in logs.items() if name not in OTHERS}
    return str({name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in theirs.items()} | more)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(trainer: Trainer, arguments: Arguments, record: dict[str, Any]) -> Table:
    """What is about to be trained, with what, and where it goes."""
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainable, total = parameter_counts(model)
    batch = record["rows_per_step"]
    table = Table.grid(padding=(0, 2))
    stage = f"ZeRO stage {record['zero_stage']}" if "zero_stage" in record else "no DeepSpeed"
    resumed = f"; resumed after step {state.global_step}" if state.global_step else ""
    table.add_row(
        "model", "the demo's" if arguments.demo else f"{arguments.run.model_name_or_path}, {total:,} parameters"
    )
    table.add_row("adapter", f"{adapted(model)}; {trainable:,} trainable ({100 * trainable / total:.2f} %)")
    schedule = f"{record['lr_scheduler_type']}, {record['warmup_steps']} steps of warm-up"
    rate = f"learning rate {record['learning_rate']:g} ({schedule})"
    table.add_row("optimizer", f"{record['optimizer']}, {rate}, {stage}")
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else 0  # of a stream: not known
    epochs = f", {state.max_steps * batch / rows:.3g} epoch(s) of {rows:,} rows" if rows else ""
    parts = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size} process(es)"
    table.add_row("steps", f"{state.max_steps:,} of {batch} rows ({parts}){epochs}{resumed}")
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device)
    table.add_row("precision", f"{precision_of(record)}, on {device}")
    if record["prompt_template"]:
        cut = f"at most {record['max_length']} tokens" if record["max_length"] else "uncut"
        table.add_row("prompts", f"template {record['prompt_template']}, {cut}")
    saves = getattr(args.save_strategy, "value", "") == "steps"
    table.add_row("output", str(args.output_dir) + (f", a checkpoint every {state.save_steps} steps" if saves else ""))
    if "tensorboard" in args.report_to:
        table.add_row("curves", f"tensorboard --logdir {Path(args.output_dir)}")
    return table


def adapted(model: nn.Module) -> str:
    """Layers, experts and rank; ranges where layers differ."""
    mixtures = [m for m in model.modules() if isinstance(m, MoELoRALayer)]
    if not mixtures:
        return f"LoRA on {sum(isinstance(m, BaseTunerLayer) for m in model.modules())} modules"
    experts = [e for layer in mixtures for e in layer.moelora_experts.values()]

    def span(name: str) -> str:
        values = sorted({getattr(e, name) for e in experts})
        return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return f"{len(mixtures)} layers, {span('num_experts')} experts of rank {span('rank')}, {span('top_k')} per token"
