"""Shows the first training batch as the trainer would get it: which tokens are read, and which are trained.

    python -m ds_moelora preview [--rows N] [--no-color] ...the launcher's flags...

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
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import datasets
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import Trainer

from launch.checks import preflight as checks
from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.effects import check_effects, check_task
from launch.checks.errors import run_guarded
from launch.demo import defaults as demo
from launch.train import quieten
from launch.training import report, trainers
from launch.training.prepared import prepare

TRAINED, READ = "bold green", "blue"
# Without colour: what is trained stands between these.
BRACKETS = ("[[", "]]")
BOUNDARY = "\n--- next row of the pack ---\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the preview.

    Raises:
        UserError: as the launcher.
    """
    own = argparse.ArgumentParser(prog="python -m ds_moelora preview", allow_abbrev=False, add_help=False)
    own.add_argument("--rows", type=int, default=1)
    own.add_argument("--no-color", action="store_true")
    options, flags = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    quieten()
    datasets.disable_progress_bars()
    color = not options.no_color and not os.environ.get("NO_COLOR")
    console = Console(no_color=not color, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse_arguments(flags, demo.DEFAULTS)
        # The run's own folder may exist already, and stays as it is.
        arguments.training.output_dir, arguments.training.report_to = folder, "none"
        checks.check_numbers(arguments)
        check_task(arguments.run)
        checks.check_data(arguments)
        check_effects(arguments)
        show(arguments, console, options.rows, color)


def show(arguments: Arguments, console: Console, rows: int, color: bool) -> None:
    """Prints `rows` rows of the first batch, and what was cut from the data."""
    trainer = build(arguments)
    batch = first_batch(trainer)
    names = getattr(trainer.model.config, "id2label", {})
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    report.print_truncation(trainer.truncation)
    size = len(batch["labels"])
    for number in range(min(rows, size)):
        console.print(Text(f"row {number + 1} of {size} in the first batch: {describe(batch, number)}", style="bold"))
        if "input_ids" in batch:
            console.print(render(batch, number, tokenizer, color))
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
    return trainers.build_trainer(arguments, _stay_on_meta(model), made.processor, made.train, None, [])


def _stay_on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, which a Trainer's `.to(device)` leaves where it is: there is nothing to move."""
    model.to = lambda *args, **kwargs: model
    return model


def first_batch(trainer: Trainer) -> dict[str, Tensor]:
    """What the first step would read, from the trainer's own loader."""
    return next(iter(trainer.get_train_dataloader()))


def describe(batch: dict[str, Tensor], number: int) -> str:
    """Sizes of one row: tokens, how many of them are trained, padding, pictures."""
    parts = []
    if "input_ids" in batch:
        real, trained = masks(batch, number)
        parts.append(f"{int(real.sum())} tokens")
        if batch["labels"].dim() == 2:
            parts.append(f"{int(trained.sum())} of them trained")
        if "position_ids" in batch:
            parts.append(f"{len(pack_starts(batch, number))} rows packed")
        elif int((~real).sum()):
            parts.append(f"{int((~real).sum())} of padding (not shown)")
    if "pixel_values" in batch:
        parts.append(f"pictures {tuple(batch['pixel_values'].shape)}")
    return ", ".join(parts)


def masks(batch: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """(T,) bool each: which tokens are real, and which the loss asks the model for.

    The first token is nobody's next one, so that its label, if it has one, is never asked for.
    """
    ids, labels = batch["input_ids"][number], batch["labels"]
    real = batch["attention_mask"][number].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
    trained = torch.zeros_like(real)
    if labels.dim() == 2:
        trained = (labels[number] != -100) & real
        trained[int(real.int().argmax())] = False
    return real, trained


def pack_starts(batch: dict[str, Tensor], number: int) -> list[int]:
    """Where the rows begin that are packed into this one."""
    return (batch["position_ids"][number] == 0).nonzero().flatten().tolist()


def render(batch: dict[str, Tensor], number: int, tokenizer: Any, color: bool) -> Text:
    """One row as text, what is trained marked by colour or brackets."""
    text = Text()
    for kind, ids in spans(batch, number):
        if kind is None:
            text.append(BOUNDARY, style="dim" if color else "")
            continue
        words = tokenizer.decode(ids)
        if color:
            text.append(words, style=TRAINED if kind else READ)
        else:
            text.append(f"{BRACKETS[0]}{words}{BRACKETS[1]}" if kind else words)
    return text


def spans(batch: dict[str, Tensor], number: int) -> Iterator[tuple[bool | None, list[int]]]:
    """Runs of tokens that are all trained (True) or all only read (False); None where the next packed row begins."""
    real, trained = masks(batch, number)
    starts = set(pack_starts(batch, number)[1:]) if "position_ids" in batch else set()
    ids, kind = [], None
    for position in real.nonzero().flatten().tolist():
        now = bool(trained[position])
        if ids and (now != kind or position in starts):
            yield kind, ids
            ids = []
        if position in starts:
            yield None, []
        kind = now
        ids.append(int(batch["input_ids"][number, position]))
    if ids:
        yield kind, ids


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
