"""The trainers: TRL's SFTTrainer and transformers' Trainer, with what a mixture needs on top."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_utils import EvalLoopOutput

from launch.checkpoint.record import settings
from launch.checkpoint.saving import PRIVATE, CheckpointedTrainer
from launch.checkpoint.stopping import Stopping
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import LANGUAGE
from launch.data.metrics import head_scores, token_scores
from launch.data.pictures import as_inputs
from launch.data.values import Rows
from launch.training.preparation import CountingTrainer, PackingGuard, Truncation

TESTED = "5.23.0"  # of transformers


class MixtureSFTTrainer(CheckpointedTrainer, CountingTrainer):
    """SFTTrainer that trains on the model's own `loss`, and whose evaluation weighs every token alike.

    TRL 1.16 computes the loss itself, and adds the routers' load-balancing loss from the model's `aux_loss`: the mean
    over the sequences of a micro-batch, then over micro-batches. With packing, micro-batches hold different numbers of
    sequences, and the gradient would depend on how a batch is cut. In the model's own `loss` a sequence weighs as much
    as it has labels, however the batch is cut.

    transformers evaluates by the mean over batches of each batch's mean, which changes with the batch size. Here the
    sums of rows are gathered and added up (`launch.data.metrics.token_scores`); rows that fill up the last batch of
    several ranks `gather_for_metrics` drops.
    """

    _sums: list[torch.Tensor]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = {**inputs, "use_cache": False, "fused_lm_head": True}
        loss, outputs = Trainer.compute_loss(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            # (B, T) each, zero where no label is.
            parts = (-outputs.log_probs, outputs.is_top1, outputs.label_mask)
            sums_B3 = torch.stack([part.double().sum(-1) for part in parts], -1)
            self._sums.append(self.accelerator.gather_for_metrics(sums_B3).sum(0))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, right, tokens = torch.stack(self._sums).sum(0).tolist()
        scores = token_scores(nll, right, tokens)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output


def tokenize_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, Truncation]:
    """`text` (and `text_pair`) as token ids, cut at `max_length`, and a count of what was cut."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]

    def tokens(**options: Any) -> Dataset:
        return rows.map(
            lambda batch: tokenizer(*(batch[name] for name in columns), verbose=False, **options),
            batched=True,
            remove_columns=columns,
            desc="Tokenizing",
        )

    count = Truncation(max_length)
    whole = count.count(tokens(), 1)
    return count.count(tokens(truncation=True, max_length=max_length) if count.rows_cut else whole, -1), count


def build_trainer(
    arguments: Arguments,
    model: PeftModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    train: Rows,
    evaluation: Dataset | None,
    callbacks: list[TrainerCallback],
    stopping: Stopping | None = None,
) -> Trainer:
    """The trainer of the task. `processor` is the tokenizer, or what prepares pictures.

    It has an attribute `truncation`: what was cut from each data set (`launch.training.preparation.Truncation`).
    """
    check_private_methods()
    common = {"model": model, "args": arguments.training, "processing_class": processor, "callbacks": callbacks}
    common |= {"settings": settings(arguments), "stopping": stopping}
    if arguments.run.task in LANGUAGE:
        return _language_trainer(train, evaluation, **common)
    return _head_trainer(arguments.run.task, train, evaluation, **common)


def check_private_methods() -> None:
    """Makes sure that this transformers has the private methods that `CheckpointedTrainer` replaces."""
    for name, expected in PRIVATE.items():
        method = getattr(Trainer, name, None)
        found = None if method is None else list(inspect.signature(method).parameters)
        if found is None or expected not in (None, found):
            raise UserError(
                f"transformers {transformers.__version__} has no Trainer.{name}({', '.join(expected or [])}), which "
                f"checkpoints need: use one of the versions that pyproject.toml allows (tested: {TESTED})."
            )


def _language_trainer(train: Rows, evaluation: Dataset | None, args: Any, **common: Any) -> Trainer:
    if args.completion_only_loss is None:
        args.completion_only_loss = True
    if isinstance(train, IterableDataset):
        # Every rank reads the stream and keeps its share. Otherwise one would read, and put batches of different
        # lengths into one tensor to send them to the others.
        args.accelerator_config.dispatch_batches = False
    trainer = MixtureSFTTrainer(train_dataset=train, eval_dataset=evaluation, args=args, **common)
    for what, rows in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if rows is not None and next(iter(rows), None) is None:
            raise UserError(f"no {what} row has an answer within --max_length {args.max_length} tokens; raise it.")
    if args.packing or args.padding_free:
        trainer.add_callback(PackingGuard(trainer))
    return trainer


def _head_trainer(task: str, train: Dataset, evaluation: Dataset | None, **common: Any) -> Trainer:
    processor, sets, truncation = common["processing_class"], {"train": train, "eval": evaluation}, {}
    if task == "image-classification":
        sets = {name: rows and as_inputs(rows, processor) for name, rows in sets.items()}
        collator = default_data_collator
    else:
        for name, rows in sets.items():
            if rows is not None:
                sets[name], truncation[name] = tokenize_texts(rows, processor, common["args"].max_length)
        collator = DataCollatorWithPadding(processor)
    trainer = CheckpointedTrainer(
        train_dataset=sets["train"],
        eval_dataset=sets["eval"],
        data_collator=collator,
        compute_metrics=head_scores,
        **common,
    )
    # transformers takes any forward with **kwargs for one that divides its loss by num_items_in_batch, and then
    # does not divide by the accumulation steps; classification heads return a plain mean.
    trainer.model_accepts_loss_kwargs = False
    trainer.truncation = truncation
    return trainer
