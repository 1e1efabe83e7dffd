"""Answers that a model writes: greedy or sampled, in batches, on one process or dealt out to all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ds_moelora.tuner import sharded_experts
from launch.checks.errors import UserError
from launch.checks.flags import ScoringArguments
from launch.data.metrics import AnswerRule
from launch.training.fit import position_limit


def prompt_tokens(prompt: Any, tokenizer: PreTrainedTokenizerBase, tools: str | None = None) -> list[int]:
    """A prompt (text or chat messages; `tools` as JSON) as the model reads it."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("the prompt is a conversation, and this tokenizer has no chat template.")
    described = json.loads(tools) if tools else None
    return tokenizer.apply_chat_template(prompt, tools=described, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int = 8,
    title: str | None = None,
    after_batch: Callable[[], None] | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt, without special tokens.

    Prompts are padded on the left, so that every answer starts right behind its prompt and none depends on the others
    of its batch; prompts of similar length share a batch.

    Args:
        prompts: as of `prompt_tokens`, in any order; the answers come in the same.
        title: of a progress bar; None: no bar. after_batch: called after each batch.
        options: for `model.generate`; greedy decoding unless they say otherwise.
    """
    positions, longest = position_limit(model), max(map(len, prompts), default=0)
    if positions is not None and longest + options.get("max_new_tokens", 0) > positions:
        raise UserError(
            f"a prompt of {longest} tokens and --max_new_tokens {options['max_new_tokens']} need more than the "
            f"{positions} positions of this model. Shorten one."
        )
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "use_cache": True, **options}
    options["eos_token_id"] = end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers, was_training = [""] * len(prompts), model.training
    model.eval()
    try:
        with tqdm(total=len(prompts), desc=title, unit="prompt", disable=title is None) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                rows = [torch.tensor(prompts[i], dtype=torch.long, device=model.device) for i in batch]
                ids_BT = pad_sequence(rows, True, tokenizer.pad_token_id, padding_side="left")
                mask_BT = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
                written = model.generate(input_ids=ids_BT, attention_mask=mask_BT, **options)
                texts = tokenizer.batch_decode(written[:, ids_BT.shape[1] :], skip_special_tokens=True)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
                bar.update(len(batch))
                if after_batch is not None:
                    after_batch()
    finally:
        model.train(was_training)
    return answers


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Every token that ends an answer: the tokenizer's, with which training ends one, and those of the base model."""
    usual = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(usual if isinstance(usual, list) else [usual])} - {None}
    return sorted(found) or None


def write_answers_on_all_ranks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    args: TrainingArguments,
    **options: Any,
) -> list[str]:
    """`write_answers`, each rank writing its share; every rank gets all answers. Every rank has to call it."""
    # Equally many on every rank, which ZeRO-3's gathering needs; what is written twice is dropped.
    share = -(-len(prompts) // args.world_size)
    mine = [prompts[(args.process_index * share + i) % len(prompts)] for i in range(share)]
    if args.process_index != 0:
        options["title"] = None
    # Every rank takes part in every forward pass: to gather weights (ZeRO-3), or experts (ep_size > 1).
    synced = is_deepspeed_zero3_enabled() or bool(sharded_experts(model))
    return gather_object(write_answers(model, tokenizer, mine, synced_gpus=synced, **options))[: len(prompts)]


class AnswerScores(TrainerCallback):
    """Adds `eval_exact_match` and `eval_answered` to every evaluation of a trainer (`AnswerRule.scores`).

    Args:
        trainer: whose `log` gets them, too. rows: with `prompt` and `completion`, as `launch.data.causal` makes them.
        scoring: which part of an answer counts, and how long it may be.
    """

    def __init__(self, trainer: Trainer, rows: Dataset, scoring: ScoringArguments) -> None:
        self.trainer, self.scoring = trainer, scoring
        self.rule = answer_rule(scoring)
        self.prompts = list(rows["prompt"])
        self.tools = rows["tools"] if "tools" in rows.column_names else [None] * len(self.prompts)
        self.wanted = [text if isinstance(text, str) else text[-1]["content"] for text in rows["completion"]]
        self.given: list[str] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        tokenizer = self.trainer.processing_class
        self.given = write_answers_on_all_ranks(
            kwargs["model"],
            tokenizer,
            [prompt_tokens(prompt, tokenizer, tools) for prompt, tools in zip(self.prompts, self.tools, strict=True)],
            args,
            batch_size=args.per_device_eval_batch_size,
            title="Answers",
            after_batch=None if self.trainer.stopping is None else self.trainer.stopping.during_evaluation,
            max_new_tokens=self.scoring.max_new_tokens,
        )
        found = {f"eval_{name}": value for name, value in self.rule.scores(self.given, self.wanted).items()}
        metrics.update(found)
        self.trainer.log(found)


def answer_rule(scoring: ScoringArguments) -> AnswerRule:
    """The rule that the flags describe."""
    return AnswerRule(scoring.answer_pattern, tuple(scoring.answer_ignore))


def wants_answers(scoring: ScoringArguments, task: str) -> bool:
    """Whether answers are to be written and scored."""
    chosen = next((name for name in ("answer_pattern", "answer_ignore") if getattr(scoring, name)), None)
    if scoring.score == "loss" and chosen:
        raise UserError(f"--{chosen} has no effect with --score loss; use --score answers.")
    if scoring.score == "loss" or (scoring.score == "auto" and not chosen):
        return False
    if task != "causal-lm":
        raise UserError(f"--score answers (or --answer_pattern) is for --task causal-lm; this task is {task}.")
    if scoring.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {scoring.max_new_tokens} must be at least 1.")
    answer_rule(scoring)
    return True
