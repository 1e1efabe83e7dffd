"""What a run of the launcher adds to the model card: data, procedure and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import Trainer

from ds_moelora.redaction import redact_text
from ds_moelora.tuner import TrainingRecord
from launch.checks.arguments import Arguments
from launch.training.remembered import precision_of
from launch.training.report import NOT_SCORES, parameter_counts

HUB_TASKS = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}


def training_record(
    arguments: Arguments, trainer: Trainer, record: dict[str, Any], eval_metrics: dict[str, float]
) -> TrainingRecord:
    """The part of the card on a run that has ended.

    Args:
        record: of `launch.training.remembered`. eval_metrics: what `evaluate()` returned; {} without evaluation data.
    """
    run = arguments.run
    data = ["the launcher's embedded demo"] if arguments.demo else [redact_text(name) for name in run.dataset_name]
    held_out = f"{run.eval_fraction:.0%} of it" if run.eval_fraction else data[0]
    held_out = redact_text(run.eval_dataset_name or held_out)
    scores = {k.removeprefix("eval_"): v for k, v in eval_metrics.items() if not k.endswith(NOT_SCORES)}
    lines = ["## Training", "", f"Data: {', '.join(f'`{name}`' for name in data)}."]
    lines += ["", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in _procedure(trainer, record).items())]
    if scores:
        lines += ["", "## Evaluation", "", f"Data: `{held_out}`.", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in scores.items()]
    results = [
        EvalResult(
            task_type=HUB_TASKS.get(run.task, run.task),
            dataset_type=_short(held_out),
            dataset_name=_short(held_out),
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in scores.items()
    ]
    on_hub = [] if arguments.demo else [name for name in data if not Path(name).expanduser().exists()]
    return TrainingRecord("\n".join(lines), on_hub, results, Path(trainer.args.output_dir).name)


def _procedure(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
    trainable, total = parameter_counts(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    settings = {k: v for k, v in record["optimizer_settings"].items() if v not in (None, False)}
    described = {
        "optimizer": record["optimizer"],
        "its settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
        "learning rate": f"{record['learning_rate']:g}, {record['lr_scheduler_type']}",
        "rows per step": f"{record['rows_per_step']} on {record['processes']} process(es)",
        "steps": trainer.state.global_step,
        "prompt template": record["prompt_template"],
        "maximum length": record["max_length"],
        "precision": precision_of(record),
        "seed": record["seed"],
        "trainable parameters": f"{trainable:,} of {total:,}",
    }
    if losses:
        described["training loss, first -> last"] = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    return {name: value for name, value in described.items() if value not in (None, "")}


def _short(name: str) -> str:
    """A hub id as it is, a file's name without its folders."""
    return Path(name).name if Path(name).expanduser().exists() else name
