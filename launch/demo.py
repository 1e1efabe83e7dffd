"""The embedded default: a tiny model learns skills it has not seen, and shows how well before and after."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ds_moelora.adapters import sharded_experts
from launch.demo_base import base_model
from launch.demo_tasks import split_lines

__all__ = ["DEFAULTS", "ExactMatch", "base_model", "dataset"]

# Defaults of the flags while the demo runs; any of them can be given on the command line.
DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/demo",
    "max_length": 32,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "logging_steps": 50,
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
    lines, _ = split_lines(TRAINING_LINES_PER_SKILL, HELD_OUT_LINES_PER_SKILL, seed)
    return Dataset.from_dict({"prompt": [p for p, _ in lines], "completion": [a for _, a in lines]})


class ExactMatch(TrainerCallback):
    """Measures, before and after training, the share of held-out lines that greedy decoding answers exactly.

    It runs inside training because a model under ZeRO-3 can only be used once the engine exists. Each rank answers
    every `world_size`-th line; the verdicts are gathered (a few hundred short tuples).

    Args:
        tokenizer: of the model; it pads on the left.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.accuracy: dict[str, dict[str, float]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.accuracy["before"] = self._measure(kwargs["model"], args, "Exact match before")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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

    @torch.no_grad()
    def _measure(self, model: nn.Module, args: TrainingArguments, title: str) -> dict[str, float]:
        _, held_out = split_lines(TRAINING_LINES_PER_SKILL, HELD_OUT_LINES_PER_SKILL, args.seed)
        lines = [(skill, prompt, answer) for skill, group in held_out.items() for prompt, answer in group]
        # Every rank runs the same number of batches, which ZeRO-3's gathering needs; what is counted twice is dropped.
        share = -(-len(lines) // args.world_size)
        mine = [(lines * 2)[args.process_index * share + i] for i in range(share)]
        was_training = model.training
        model.eval()
        verdicts = []
        for start in tqdm(range(0, share, EVALUATION_BATCH), desc=title, disable=args.process_index != 0):
            part = mine[start : start + EVALUATION_BATCH]
            answers = self._answer(model, [prompt for _, prompt, _ in part])
            verdicts += [(skill, given == wanted) for (skill, _, wanted), given in zip(part, answers, strict=True)]
        model.train(was_training)
        gathered = gather_object(verdicts)[: len(lines)]
        right, total = Counter(skill for skill, ok in gathered if ok), Counter(skill for skill, _ in gathered)
        accuracy = {skill: right[skill] / total[skill] for skill in held_out}
        return {**accuracy, "all skills": sum(right.values()) / len(gathered)}

    def _answer(self, model: nn.Module, prompts: list[str]) -> list[str]:
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        encoded = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
        generated = model.generate(
            **encoded,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            # Every rank takes part in every forward pass: to gather weights (ZeRO-3), or experts (ep_size > 1).
            synced_gpus=is_deepspeed_zero3_enabled() or bool(sharded_experts(model)),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
