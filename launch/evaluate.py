"""Scores an adapter (or a base model) on evaluation data; needs no DeepSpeed.

    python launch/evaluate.py --adapter outputs/boolq --dataset_name data/boolq.test.jsonl
    python launch/evaluate.py --adapter outputs/arc --dataset_name arc.test.jsonl --answer_pattern 'is (answer\\d)'
    python launch/evaluate.py --config recipe.yaml              # the recipe's output_dir on its evaluation data

docs/evaluation.md has the metrics and all flags. The model is scored by the trainer that `launch/train.py` evaluates
with while it trains, so that both give the same numbers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: Python put this folder first on the path; the repository's root is what is needed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch import quiet  # isort: skip  (before DeepSpeed is imported)

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ds_moelora.redaction import redact
from launch.checks.arguments import Arguments, command_line, read_flags
from launch.checks.effects import check_task
from launch.checks.errors import UserError, run_guarded
from launch.checks.flags import (
    SCORED_TASKS,
    TASKS,
    TEMPLATES,
    TRAINING_CLASSES,
    AdapterArguments,
    DataArguments,
    RunArguments,
    ScoringArguments,
    flag,
)
from launch.data import answering, classification
from launch.data.rows import load_rows
from launch.data.sources import converter
from launch.demo import defaults as demo
from launch.training import fit, trainers
from launch.training.loading import (
    Source,
    SourceArguments,
    find_source,
    inference_precision,
    load_for_inference,
    load_processor,
    quieten,
)
from launch.training.remembered import note, settle_template
from launch.training.report import write_text

DEMO = "demo"
LIBRARIES = ("ds_moelora", "torch", "transformers", "peft", "trl", "datasets")
# What the trainer says about its own work.
NOT_SCORES = ("_runtime", "_per_second", "_model_preparation_time", "epoch")


@dataclass
class EvaluationArguments(SourceArguments, DataArguments):
    """What is scored on which data. Columns, patterns and templates are those of `launch/train.py`."""

    task: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(SCORED_TASKS)}. Default: the adapter's.", "choices": list(SCORED_TASKS)},
    )
    dataset_name: str | None = flag(None, "Data: a file, a folder or a hub id; demo: the demo's held-out lines.")
    dataset_split: str | None = flag(None, "Its split. Default: the first of validation, test, dev, train it has.")
    batch_size: int = flag(16, "Rows per batch; scores do not depend on it.")
    max_length: int | None = flag(None, "Longest row in tokens. Default: as in training.")
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "How instruction rows become a prompt. Default: as in training.", "choices": list(TEMPLATES)},
    )
    classes: list[str] = field(
        default_factory=list, metadata={"help": "Names of the classes by id. Default: those in train_summary.json."}
    )
    json: bool = flag(False, "Print the results as JSON, alone on stdout.")
    output: str | None = flag(None, "Results (JSON). Default: evaluation-DATA.json in the adapter's folder.")
    predictions: str | None = flag(None, "With answers: a jsonl file that gets every prompt, answer and reference.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluates, prints a table and writes the results; returns them, too."""
    quieten()
    started = time.monotonic()
    wish, scoring = read_arguments(sys.argv[1:] if argv is None else argv)
    source = find_source(wish, wish.task, wish.classes)
    wish.task, wish.model_name_or_path = source.task, source.base
    answers = answering.wants_answers(scoring, source.task)
    settle_training(wish, source)
    check_task(wish)
    if wish.max_length is not None and source.task == "image-classification":
        raise UserError(f"--max_length {wish.max_length} has no effect with --task {source.task}.")
    if wish.classes and source.task == "causal-lm":
        raise UserError(f"--classes {' '.join(wish.classes)} has no effect with --task {source.task}.")
    if wish.predictions and not answers:
        raise UserError("--predictions needs answers: --score answers, or --answer_pattern.")
    processor = load_processor(source)
    rows = load_evaluation_rows(wish, source, processor)
    model = load_for_inference(source, processor)
    with tempfile.TemporaryDirectory() as folder, inference_precision(model, source.dtype):
        trainer = build_evaluator(wish, scoring, model, processor, rows, folder)
        writer = answering.AnswerScores(trainer, rows, scoring) if answers else None
        if writer is not None:
            trainer.add_callback(writer)
        metrics = trainer.evaluate()
    results = {
        "command": command_line(),
        "adapter": source.adapter,
        "base_model": source.base,
        "task": source.task,
        "dataset": wish.dataset_name,
        "rows": len(rows),
        "prompt_template": wish.prompt_template if source.task == "causal-lm" else None,
        "max_length": wish.max_length,
        "metrics": {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(NOT_SCORES)},
        "batch_size": wish.batch_size,
        "dtype": str(source.dtype).removeprefix("torch."),
        "device": str(model.device),
        "seconds": round(time.monotonic() - started, 2),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    paths = [write_results(results, wish, source)]
    if writer is not None and wish.predictions:
        paths.append(write_predictions(Path(wish.predictions), writer))
    if wish.json:
        print(json.dumps(redact(results), indent=2), file=quiet.answers(), flush=True)
    else:
        print_results(results, [path for path in paths if path is not None])
    return results


def settle_training(wish: EvaluationArguments, source: Source) -> None:
    """Completes template and length by those of the training; what differs from it is said."""
    if source.task != "causal-lm":
        wish.prompt_template = wish.prompt_template or RunArguments.prompt_template
        if source.task == "sequence-classification" and wish.max_length is None:
            wish.max_length = source.trained.max_length
        return
    wish.prompt_template = settle_template(wish.prompt_template, source.trained, RunArguments.prompt_template)
    if source.trained.formats and not wish.prompt_format:
        note(f"This adapter was trained with {' '.join(source.trained.formats)}; pass them for rows of that kind.")
    known = source.trained.max_length
    if wish.max_length is None:
        wish.max_length = known
    elif known is not None and wish.max_length != known:
        note(f"--max_length {wish.max_length}: this adapter was trained with {known}.")


def read_arguments(argv: Sequence[str]) -> tuple[EvaluationArguments, ScoringArguments]:
    """The flags, and those of the recipe that mean something here.

    Of a recipe for training the evaluation data is taken, and `output_dir` as the adapter.
    """

    def translate(recipe: dict[str, Any]) -> dict[str, Any]:
        def names(*kinds: type) -> set[str]:
            return {item.name for kind in kinds for item in fields(kind) if item.init}

        training = TRAINING_CLASSES.get(recipe.get("task"), TRAINING_CLASSES[TASKS[0]])
        for_training = names(RunArguments, AdapterArguments, training) - names(EvaluationArguments, ScoringArguments)
        data = ("dataset_name", "dataset_split")
        kept = {"adapter": recipe["output_dir"]} if "output_dir" in recipe else {}
        kept |= {key: value for key, value in recipe.items() if key not in for_training | {*data}}
        return kept | {name: recipe[f"eval_{name}"] for name in data if f"eval_{name}" in recipe}

    wish, scoring = read_flags((EvaluationArguments, ScoringArguments), argv, "launch/evaluate.py", translate)
    if not wish.dataset_name:
        raise UserError("--dataset_name is missing: the data to evaluate on (a file, a folder, a hub id, or demo).")
    if wish.batch_size < 1:
        raise UserError(f"--batch_size {wish.batch_size} must be at least 1.")
    return wish, scoring


def load_evaluation_rows(
    wish: EvaluationArguments, source: Source, processor: PreTrainedTokenizerBase | BaseImageProcessor
) -> Dataset:
    """The rows as the task's trainer takes them."""
    where = f"--dataset_name {wish.dataset_name}"
    if wish.dataset_name == DEMO:
        return demo.held_out_rows(TRAINING_CLASSES[TASKS[0]].seed)
    rows = load_rows(
        wish.dataset_name,
        "--dataset_name",
        wish.dataset_split,
        wish.dataset_config,
        wish.max_eval_samples,
        pictures=source.task == "image-classification",
    )
    made = converter(source.task, processor, source.regression)(rows, wish, where)
    if source.task == "causal-lm":
        return made
    names = source.classes or classification.class_names(rows, wish)
    names = [] if source.regression else classification.label_names(made, where, names)
    return classification.number_labels(made, names, where)


def build_evaluator(
    wish: EvaluationArguments,
    scoring: ScoringArguments,
    model: Any,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    rows: Dataset,
    folder: str,
) -> trainers.Trainer:
    """The task's trainer, which will train nothing."""
    options: dict[str, Any] = {"per_device_eval_batch_size": wish.batch_size, "report_to": "none", "output_dir": folder}
    options["disable_tqdm"] = False  # it would go by the verbosity
    if wish.max_length is not None:
        options["max_length"] = wish.max_length
    training = TRAINING_CLASSES[wish.task](**options)
    training.bf16 = False  # `inference_precision` sees to it
    training.gradient_checkpointing = False
    training.include_num_input_tokens_seen = "no"
    training.start()
    arguments = Arguments(run=wish, adapter=AdapterArguments(), scoring=scoring, training=training, demo=False)
    fit.check_fit(arguments, model, processor, rows)
    # TRL insists on training rows, and warns where a completion's first letter joins the prompt's last token.
    train = Dataset.from_dict({"prompt": ["a"], "completion": [" b"]}) if wish.task == "causal-lm" else rows.select([0])
    return trainers.build_trainer(arguments, model, processor, train, rows, [])


def write_results(results: dict[str, Any], wish: EvaluationArguments, source: Source) -> Path | None:
    """Writes the JSON file; None without --output and without a local adapter."""
    if wish.output is None and (source.adapter is None or not Path(source.adapter).is_dir()):
        return None
    name = f"evaluation-{Path(str(wish.dataset_name)).name.removesuffix('.jsonl')}.json"
    path = Path(wish.output) if wish.output is not None else Path(source.adapter) / name
    return write_text(path, json.dumps(redact(results), indent=2) + "\n")


def write_predictions(path: Path, writer: answering.AnswerScores) -> Path:
    """One JSON line per row: prompt, what the model wrote, the reference, the answer taken from it, and the verdict."""
    lines = []
    for prompt, given, wanted in zip(writer.prompts, writer.given, writer.wanted, strict=True):
        answer = writer.rule.extract(given)
        right = answer is not None and answer == writer.rule.reference(wanted)
        lines.append({"prompt": prompt, "written": given, "reference": wanted, "answer": answer, "right": right})
    return write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def print_results(results: dict[str, Any], paths: list[Path]) -> None:
    """The results as a table."""
    table = Table(title="Evaluation", show_header=False, title_justify="left")
    table.add_row("adapter", results["adapter"] or "none")
    for key in ("base_model", "task", "dataset"):
        table.add_row(key.replace("_", " "), str(results[key]))
    table.add_row("rows", f"{results['rows']:,}")
    for key, value in results["metrics"].items():
        table.add_row(key.replace("_", " "), f"{value:,.0f}" if key == "tokens" else f"{value:.4f}")
    if results["prompt_template"] is not None:
        table.add_row("prompt template", results["prompt_template"])
    table.add_row("run", f"{results['seconds']:.1f} s, {results['dtype']} on {results['device']}")
    for path in paths:
        table.add_row("written", str(path))
    Console(markup=False, emoji=False).print(table)


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
