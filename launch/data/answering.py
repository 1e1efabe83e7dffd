"""Answers that a model writes: greedy or sampled, in batches, on one process or dealt out to all ranks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ds_moelora.tuner import sharded_experts
from launch.checks.errors import UserError
from launch.checks.flags import ScoringArguments
from launch.data.metrics import AnswerRule
from launch.training.fit import position_limit


@contextlib.contextmanager
def _ready_to_answer(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


Worded = tuple[str, bool]  # a prompt's text, and whether the tokenizer still has to add its special tokens to it


def word_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, tools: str | None = None) -> Worded:
    """A prompt (text or chat messages; `tools` as JSON) as text.

    Raises:
        UserError: messages, and a tokenizer without chat template.
    """
    if isinstance(prompt, str):
        return prompt, True
    if not tokenizer.chat_template:
        raise UserError("the prompt is a conversation, and this tokenizer has no chat template.")
    described = json.loads(tools) if tools else None
    return tokenizer.apply_chat_template(prompt, tools=described, add_generation_prompt=True, tokenize=False), False


def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Worded],
    batch_size: int = 8,
    description: str | None = None,
    **options: Any,
) -> list[str]:
    """What the model writes after each prompt, without special tokens.

    Prompts are padded on the left, so that every answer starts right behind its prompt and none depends on the others
    of its batch; prompts of similar length share a batch.

    Args:
        prompts: as `word_prompt` words them, in any order; the answers come in the same.
        description: title of a progress bar; None: no bar.
        options: for `model.generate`; greedy decoding unless they say otherwise.

    Raises:
        UserError: a prompt and its answer are longer than the model's table of positions.
    """
    texts = list(prompts)
    if len({special for _, special in texts}) > 1:
        raise UserError("prompts are either all text or all chat messages.")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]), reverse=True)
    positions = position_limit(model)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "use_cache": True, **options}
    answers = [""] * len(texts)
    bar = tqdm(total=len(texts), desc=description, unit="prompt", disable=description is None)
    with _ready_to_answer(model), bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            encoded = tokenizer(
                [texts[i][0] for i in batch],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=texts[batch[0]][1],
            )
            encoded = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
            length = encoded["input_ids"].shape[1] + options.get("max_new_tokens", 0)
            if positions is not None and length > positions:
                raise UserError(
                    f"a prompt of {encoded['input_ids'].shape[1]} tokens and --max_new_tokens "
                    f"{options['max_new_tokens']} need {length} positions; this model has {positions}. Shorten one."
                )
            written = model.generate(**encoded, eos_token_id=end_tokens(model, tokenizer), **options)
            new = tokenizer.batch_decode(written[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, new, strict=True):
                answers[i] = text
            bar.update(len(batch))
    return answers


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Every token that ends an answer: the tokenizer's, with which training ends one, and those of the base model."""
    usual = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(usual if isinstance(usual, list) else [usual])} - {None}
    return sorted(found) or None


def write_answers_on_all_ranks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Worded],
    args: TrainingArguments,
    **options: Any,
) -> list[str]:
    """`write_answers`, each rank writing its share; every rank gets all answers. Every rank has to call it."""
    # Equally many on every rank, which ZeRO-3's gathering needs; what is written twice is dropped.
    share = -(-len(prompts) // args.world_size)
    mine = [prompts[(args.process_index * share + i) % len(prompts)] for i in range(share)]
    if args.process_index != 0:
        options["description"] = None
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
        tools = rows["tools"] if "tools" in rows.column_names else [None] * len(self.prompts)
        self.asked = list(zip(self.prompts, tools, strict=True))
        self.wanted = [text if isinstance(text, str) else text[-1]["content"] for text in rows["completion"]]
        self.given: list[str] = []

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        self.given = write_answers_on_all_ranks(
            kwargs["model"],
            self.trainer.processing_class,
            [word_prompt(prompt, self.trainer.processing_class, tools) for prompt, tools in self.asked],
            args,
            batch_size=args.per_device_eval_batch_size,
            description="Answers",
            max_new_tokens=self.scoring.max_new_tokens,
        )
        found = {f"eval_{name}": value for name, value in self.rule.scores(self.given, self.wanted).items()}
        metrics.update(found)
        self.trainer.log(found)


def answer_rule(scoring: ScoringArguments) -> AnswerRule:
    """The rule that the flags describe.

    Raises:
        UserError: as `AnswerRule`, or fewer than one new token.
    """
    if scoring.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {scoring.max_new_tokens} must be at least 1.")
    return AnswerRule(scoring.answer_pattern, tuple(scoring.answer_ignore))


def wants_answers(scoring: ScoringArguments, task: str) -> bool:
    """Whether answers are to be written and scored.

    Raises:
        UserError: flags for answers that have no effect.
    """
    chosen = [name for name in ("answer_pattern", "answer_ignore") if getattr(scoring, name)]
    if scoring.score == "auto":
        wanted = bool(chosen)
    else:
        wanted = scoring.score == "answers"
        if chosen and not wanted:
            raise UserError(f"--{chosen[0]} has no effect with --score {scoring.score}; use --score answers.")
    if wanted and task != "causal-lm":
        raise UserError(f"--score answers (or --answer_pattern) is for --task causal-lm; this task is {task}.")
    if wanted:
        answer_rule(scoring)
    return wanted
