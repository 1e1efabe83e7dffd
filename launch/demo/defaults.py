"""The embedded default: a tiny model learns skills it has not seen, and shows how well before and after."""

from __future__ import annotations

from collections import Counter
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from launch.data.answering import prompt_tokens, write_answers_on_all_ranks
from launch.demo.base import base_model, describe_base
from launch.demo.tasks import Line, split_lines

__all__ = ["DEFAULTS", "ExactMatch", "base_model", "dataset", "describe_base"]

# Defaults of the flags while the demo runs; any of them can be given on the command line.
DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/demo",
    "max_length": 32,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "save_steps": 300,
    "save_total_limit": 1,
    "gradient_checkpointing": False,
    "r": 8,
    "lora_alpha": 16.0,
    "num_experts": 6,
    "top_k": 2,
}
TRAINING_LINES_PER_SKILL = 2500
HELD_OUT_LINES_PER_SKILL = 64
EVALUATION_BATCH = 64
MAX_ANSWER_TOKENS = 6


def dataset(seed: int) -> Dataset:
    """Training lines as prompt and completion."""
    return _rows(split_lines(TRAINING_LINES_PER_SKILL, HELD_OUT_LINES_PER_SKILL, seed)[0])


def held_out_rows(seed: int) -> Dataset:
    """The held-out lines of all skills, in the same form."""
    held_out = split_lines(TRAINING_LINES_PER_SKILL, HELD_OUT_LINES_PER_SKILL, seed)[1]
    return _rows([line for group in held_out.values() for line in group])


def _rows(lines: list[Line]) -> Dataset:
    return Dataset.from_dict({"prompt": [p for p, _ in lines], "completion": [a for _, a in lines]})


class ExactMatch(TrainerCallback):
    """Measures, before and after training, the share of held-out lines that greedy decoding answers exactly.

    It runs inside training because a model under ZeRO-3 can only be used once the engine exists.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.accuracy: dict[str, dict[str, float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accuracy["before"] = self._measure(kwargs["model"], args, "Exact match before")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accuracy["after"] = self._measure(kwargs["model"], args, "Exact match after")

    def print_table(self) -> None:
        """The accuracies as a table."""
        table = Table(title="Exact match on held-out lines (greedy decoding)", title_justify="left")
        table.add_column("skill")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for skill, after in self.accuracy["after"].items():
            table.add_row(skill, f"{100 * self.accuracy['before'][skill]:.1f} %", f"{100 * after:.1f} %")
        Console().print(table)

    def _measure(self, model: nn.Module, args: TrainingArguments, title: str) -> dict[str, float]:
        _, held_out = split_lines(TRAINING_LINES_PER_SKILL, HELD_OUT_LINES_PER_SKILL, args.seed)
        lines = [(skill, prompt, answer) for skill, group in held_out.items() for prompt, answer in group]
        given = write_answers_on_all_ranks(
            model,
            self.tokenizer,
            [prompt_tokens(prompt, self.tokenizer) for _, prompt, _ in lines],
            args,
            batch_size=EVALUATION_BATCH,
            title=title,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        right = Counter(skill for (skill, _, answer), text in zip(lines, given, strict=True) if text == answer)
        accuracy = {skill: right[skill] / len(group) for skill, group in held_out.items()}
        return {**accuracy, "all skills": right.total() / len(lines)}
