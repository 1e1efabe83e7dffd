"""The closing summary: a table on the screen and `train_summary.json`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer

from ds_moelora.redaction import redact
from launch.checks.arguments import command_line
from launch.training.preparation import Truncation

SUMMARY_NAME, CURVE_NAME = "train_summary.json", "loss.png"
WIDTH = 116  # of tables that go to a file or a pipe
LOSSES = {"loss": "training", "eval_loss": "evaluation"}
# What the trainer says about its own work.
NOT_SCORES = ("_runtime", "_per_second", "_model_preparation_time", "epoch", "num_input_tokens_seen", "_tokens")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) elements over all ranks; of a parameter that ZeRO-3 or `ep_size` shards, those of the whole."""
    sizes = [(getattr(p, "ds_numel", p.numel()) * _expert_ranks(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def _expert_ranks(param: nn.Parameter) -> int:
    """Ranks that hold other experts of the same parameter; DeepSpeed's group is called after their number."""
    return 1 if getattr(param, "allreduce", True) else int(str(param.group_name).removeprefix("ep_size_"))  # type: ignore[attr-defined]


def print_truncation(truncation: Mapping[str, Truncation]) -> None:
    """What was cut, one line per data set; of a stream it is known at the end only (`train_summary.json`)."""
    for name, count in truncation.items():
        if count.max_length is not None and not count.streamed:
            print(count.report(name), flush=True)


def summarize(
    trainer: Trainer,
    optimizer: str,
    eval_metrics: dict[str, float],
    session: tuple[int, int, float],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """What the run did, as plain values.

    Args:
        eval_metrics: what `evaluate()` returned; empty without an evaluation set.
        session: steps and tokens since the start or the resume, and the seconds that these steps took.
    """
    trainable, total = parameter_counts(trainer.model)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    steps, tokens, seconds = session
    output_dir = Path(trainer.args.output_dir)
    return {
        "command": command_line(),
        "optimizer": optimizer,
        "world_size": trainer.args.world_size,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "steps": trainer.state.global_step,
        "resumed_after_step": trainer.state.global_step - steps,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval": {key: value for key, value in eval_metrics.items() if isinstance(value, int | float)},
        "log": [entry for entry in history if "loss" in entry],
        "adapter": str(output_dir),
        "checkpoints": sorted(str(path) for path in output_dir.glob("checkpoint-*")),
        "tensorboard": f"tensorboard --logdir {output_dir}" if "tensorboard" in trainer.args.report_to else None,
        **extra,
    }


def write_summary(summary: dict[str, Any], output_dir: str) -> Path:
    """Writes `train_summary.json`, without secrets."""
    return write_text(Path(output_dir) / SUMMARY_NAME, json.dumps(redact(summary), indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes a file, and its folder; whoever reads it never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def terminal() -> Console:
    """For tables: paths may hold square brackets, and a file has no width of its own."""
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """The summary as a table."""
    table = Table(title="Training summary", show_header=False, title_justify="left")
    share = 100 * summary["trainable_parameters"] / summary["all_parameters"]
    table.add_row("optimizer", summary["optimizer"])
    table.add_row(
        "trainable parameters",
        f"{summary['trainable_parameters']:,} of {summary['all_parameters']:,} ({share:.2f} %)",
    )
    before = summary.get("resumed_after_step")
    resumed = f", {summary['steps'] - before} of them since the resume" if before else ""
    table.add_row("steps", f"{summary['steps']} on {summary['world_size']} process(es){resumed}")
    if summary["seconds"]:
        rate = f", {summary['tokens_per_second']:,.0f} tokens/s" if summary["tokens_per_second"] else ""
        table.add_row("time of these steps", f"{summary['seconds']:.1f} s{rate}")
    if summary["first_loss"] is not None:
        table.add_row("loss, first -> last", f"{summary['first_loss']:.4f} -> {summary['last_loss']:.4f}")
    for key, value in summary["eval"].items():
        if not key.endswith(NOT_SCORES):
            table.add_row(key.replace("_", " "), f"{value:.4f}")
    table.add_row("adapter", summary["adapter"])
    table.add_row("checkpoints", "\n".join(summary["checkpoints"]) or "none")
    if summary["tensorboard"]:
        table.add_row("curves", summary["tensorboard"])
    if (curve := path.with_name(CURVE_NAME)).exists():
        table.add_row("loss curve", str(curve))
    table.add_row("this summary", str(path))
    terminal().print(table)


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """A PNG of the training loss, and of the evaluations' losses, over steps; nothing without two points."""
    series = {name: [(e["step"], e[key]) for e in history if key in e] for key, name in LOSSES.items()}
    if len(series["training"]) < 2:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # seconds to import, and needed here alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=path.parent.name)
    for (name, points), style in zip(series.items(), ("-", "o-"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
