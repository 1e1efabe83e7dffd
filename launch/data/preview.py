"""Shows the first training batch as the trainer would get it: which tokens are read, and which are trained.

    ds-moelora preview [--rows N] [--no-color] ...the launcher's flags...

No weights are loaded: the trainer gets the model as a shape, and is asked for its first batch. So what is shown has
gone through the very code that trains: reading, mixing, templates, tokenizer, mask, cutting, packing, order and
collation. Neither DeepSpeed nor an optimizer takes part.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch import quiet  # isort: skip  # noqa: F401  (before DeepSpeed is imported)

import datasets
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import Trainer

from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.errors import run_guarded
from launch.checks.preflight import check_flags
from launch.demo import defaults as demo
from launch.train import quieten
from launch.training import report, trainers
from launch.training.prepared import prepare
from launch.training.processors import tokenizer_of

TRAINED, READ = "bold green", "blue"
LEGEND = "[[...]]: trained, the rest is read only."
LEGEND_IN_COLOR = "Green: trained; blue: read only."
BOUNDARY = "\n--- next row of the pack ---\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the preview."""
    options, flags = read_options(argv)
    quieten()
    datasets.disable_progress_bars()
    color = not options.no_color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    console = Console(no_color=not color, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse_arguments(flags, demo.DEFAULTS)
        # The run's own folder may exist already, and stays as it is.
        arguments.training.output_dir, arguments.training.report_to = folder, "none"
        check_flags(arguments)
        show(arguments, console, options.rows, color)
        console.print(Text(LEGEND_IN_COLOR if color else LEGEND))


def read_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The preview's own flags, and the launcher's."""
    own = argparse.ArgumentParser(
        prog="ds-moelora preview",
        description="The first training batch as the trainer would get it: which tokens are read, which are trained.",
        epilog="All other flags are those of launch/train.py.",
        allow_abbrev=False,
    )
    own.add_argument("--rows", type=int, default=1, help="rows of the batch to show (default: 1)")
    own.add_argument("--no-color", action="store_true", help="trained tokens between [[ and ]], as in a pipe")
    options, flags = own.parse_known_args(argv)
    if options.rows < 1:
        own.error(f"--rows {options.rows} must be at least 1")
    return options, flags


def show(arguments: Arguments, console: Console, rows: int, color: bool) -> None:
    """Prints `rows` rows of the first batch, and what was cut from the data."""
    trainer = build(arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    names = getattr(trainer.model.config, "id2label", {})
    report.print_truncation(trainer.truncation)
    size = len(batch["labels"])
    for number in range(min(rows, size)):
        console.print(Text(f"row {number + 1} of {size} in the first batch: {describe(batch, number)}", style="bold"))
        if "input_ids" in batch:
            console.print(render(batch, number, tokenizer_of(trainer.processing_class), color))
        if batch["labels"].dim() == 1:
            console.print(Text(f"label: {names[int(batch['labels'][number])]}", style=TRAINED if color else ""))


def build(arguments: Arguments) -> Trainer:
    """The trainer of the run, with a model that has no weights.

    DeepSpeed is left out: in one process it changes nothing about the data.
    """
    training = arguments.training
    training.deepspeed, training.gradient_checkpointing, training.eval_strategy = None, False, "no"
    arguments.run.eval_dataset_name = None
    training.activation_checkpointing = False
    made, model = prepare(arguments)
    training.start()
    training.use_cpu = True
    model.to = lambda *args, **kwargs: model  # the Trainer's `.to(device)`: there is nothing to move
    return trainers.build_trainer(arguments, model, made.processor, made.train, None, [])


def describe(batch: dict[str, Tensor], number: int) -> str:
    """Sizes of one row: tokens, how many of them are trained, padding, pictures."""
    parts = []
    if "input_ids" in batch:
        real, trained = masks(batch, number)
        parts.append(f"{int(real.sum())} tokens")
        if batch["labels"].dim() == 2:
            parts.append(f"{int(trained.sum())} of them trained")
        if "position_ids" in batch:
            parts.append(f"{int((batch['position_ids'][number] == 0).sum())} rows packed")
        elif not real.all():
            parts.append(f"{int((~real).sum())} of padding (not shown)")
    if "pixel_values" in batch:
        parts.append(f"pictures {tuple(batch['pixel_values'].shape)}")
    return ", ".join(parts)


def masks(batch: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """(T,) bool each: which tokens are real, and which the loss asks the model for.

    No token comes before the first one, so that its label, if it has one, is never asked for.
    """
    ids, labels = batch["input_ids"][number], batch["labels"]
    real = batch["attention_mask"][number].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    trained = torch.zeros_like(real)
    if labels.dim() == 2:
        trained = (labels[number] != -100) & real
        trained[int(real.int().argmax())] = False
    return real, trained


def spans(batch: dict[str, Tensor], number: int) -> Iterator[tuple[bool | None, list[int]]]:
    """Runs of tokens that are all trained (True) or all only read (False); None where the next packed row begins."""
    ids = batch["input_ids"][number]
    real, trained = masks(batch, number)
    packed = (batch["position_ids"][number] == 0).cumsum(0) if "position_ids" in batch else torch.ones_like(ids)
    last = 1
    shown = zip(packed[real].tolist(), trained[real].tolist(), ids[real].tolist(), strict=True)
    for (row, kind), run in groupby(shown, key=lambda token: token[:2]):
        if row != last:
            yield None, []
        yield kind, [token for _, _, token in run]
        last = row


def render(batch: dict[str, Tensor], number: int, tokenizer: Any, color: bool) -> Text:
    """One row as text, what is trained marked by colour or brackets."""
    text = Text()
    for kind, ids in spans(batch, number):
        words = BOUNDARY if kind is None else tokenizer.decode(ids)
        if color:
            text.append(words, style="dim" if kind is None else TRAINED if kind else READ)
        else:
            text.append(f"[[{words}]]" if kind else words)
    return text


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
