"""The trainers: TRL's SFTTrainer and transformers' Trainer, with what a mixture needs on top."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINING_ARGS_NAME

from ds_moelora import data_only, load_elastic, save_elastic
from ds_moelora.checkpoint.elastic import topology_changes, why_not_elastic
from ds_moelora.checkpoint.elastic_folder import read_manifest
from ds_moelora.tuner import append_experts, sharded_experts, without_experts
from launch.checkpoint.saving import AtomicTrainer
from launch.checkpoint.stopping import Stopping, ignore_signals
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import LANGUAGE
from launch.data import images
from launch.data.evaluation import RowScores, TokenScores
from launch.data.metrics import head_scores
from launch.data.values import Rows
from launch.training.preparation import CountingTrainer, PackingGuard, Truncation

ELASTIC = "elastic"  # folder of a checkpoint


class GatheringTrainer(AtomicTrainer):
    """A Trainer that saves whole experts when they are spread over ranks (`ep_size > 1`), and resumes anywhere.

    transformers calls `_save` on every rank, but `save_pretrained`, which would gather them, on one. So it saves the
    rest, and the experts are gathered and added to the file afterwards, one factor of one layer at a time.

    Every checkpoint has an elastic part (`ELASTIC`) beside DeepSpeed's own files. In the same topology those are
    resumed, equal to the bit; in another, which DeepSpeed cannot do, the elastic part.
    """

    saves_elastic = False
    unsafe_checkpoints = False

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' own; the loss is watched."""
        loss = super().training_step(*args, **kwargs)
        if self.stopping is not None:
            self.stopping.see(loss)
        return loss

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        # Rows that are evaluated are never dropped, whatever training does with its last batch.
        drop = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop and is_training
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop
        loader.worker_init_fn = partial(ignore_signals, loader.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the last checkpoint of a run that was finished, or nearly: transformers would do one more
            # step before it looks.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is None or not sharded_experts(model):
            super()._save(output_dir, state_dict)
            self._remove_arguments(output_dir)
            return
        with without_experts():
            super()._save(output_dir, state_dict)
            self._remove_arguments(output_dir)
        append_experts(model, output_dir if output_dir is not None else self.args.output_dir)

    def _remove_arguments(self, output_dir: str | None) -> None:
        """transformers pickles its arguments beside the weights; nothing reads them, and nobody should have them."""
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's card with the adapter's part (`ds_moelora.tuner.files.card`), not those of transformers and TRL."""
        if self.is_world_process_zero():
            self.accelerator.unwrap_model(self.model).create_or_update_model_card(self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.saves_elastic:
            save_elastic(self.deepspeed, Path(output_dir) / ELASTIC)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # the engine exists from here on
        if self.deepspeed.checkpoint_engine.is_decoupled():
            raise UserError(
                'the DeepSpeed config\'s "checkpoint.writer" writes in the background: a checkpoint would be called '
                "complete before it is. Remove it."
            )
        obstacle = why_not_elastic(self.deepspeed)
        self.saves_elastic = obstacle is None
        if obstacle and self.is_world_process_zero():
            print(f"Checkpoints will fit this topology alone: {obstacle}", flush=True)
        if resume_from_checkpoint is not None:
            self._load_training_state(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # it may be older than a change of topology
            self._load_training_state(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_training_state(self, checkpoint: str) -> None:
        """Weights and optimizer state: DeepSpeed's own files if they fit the topology, otherwise the elastic part."""
        elastic = Path(checkpoint) / ELASTIC
        changes = topology_changes(self.deepspeed, elastic) if elastic.is_dir() else []
        if not changes:
            with nullcontext() if self.unsafe_checkpoints else data_only():
                deepspeed_load_checkpoint(self.deepspeed, checkpoint, load_module_strict=False)
            return
        batches = read_manifest(elastic)["train_batch_size"], self.deepspeed.train_batch_size()
        if batches[0] != batches[1]:
            changes.append(f"samples per step {batches[0]} -> {batches[1]}")
        if self.is_world_process_zero():
            print(f"{checkpoint}: the topology has changed, {', '.join(changes)}. Resuming from {elastic}.", flush=True)
        load_elastic(self.deepspeed, elastic)


class MixtureSFTTrainer(TokenScores, GatheringTrainer, CountingTrainer):
    """SFTTrainer that trains on the model's own `loss`.

    TRL 1.16 computes the loss from the log-probabilities that its fused head returns, and so leaves out what a tuner
    adds to the model's `loss`: the load-balancing term of the routers. The fused head returns a `loss` too, in which
    that term is; this class takes it.
    """

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
            self.count_tokens(outputs)
        return (loss, outputs) if return_outputs else loss


class HeadTrainer(RowScores, GatheringTrainer):
    """The trainer of models with a classification head."""


class OptimizerGuard(TrainerCallback):
    """Says which class runs, if DeepSpeed has its own for the name in the config ("AdamW": FusedAdam or CPUAdam).

    That another optimizer runs in place of one of the package's is refused by the engine itself
    (`ds_moelora.optimizer.guard`).

    Args:
        wanted: the `type` in the DeepSpeed config, or `--optim`.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.trainer: Trainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self.trainer.deepspeed if self.trainer is not None else None
        if engine is None or not self.trainer.is_world_process_zero():
            return
        running = type(engine.basic_optimizer)
        if running.__name__ != self.wanted:
            print(f"Optimizer: {self.wanted} is {running.__module__}.{running.__name__} here.", flush=True)


def tokenize_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, Truncation]:
    """`text` (and `text_pair`) as token ids, cut at `max_length`, and a count of what was cut."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    count = Truncation(max_length, rows=len(rows))

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[name] for name in columns]
        whole = tokenizer(*texts, verbose=False)
        lengths = [len(ids) for ids in whole["input_ids"]]
        cut = whole if max(lengths) <= max_length else tokenizer(*texts, truncation=True, max_length=max_length)
        return {**cut, "whole_length": lengths}

    made = rows.map(tokenize, batched=True, remove_columns=columns, desc="Tokenizing")
    lengths = np.asarray(made["whole_length"])
    count.tokens, count.rows_cut = int(lengths.sum()), int((lengths > max_length).sum())
    count.tokens_cut = int((lengths - max_length).clip(min=0).sum())
    return made.remove_columns("whole_length"), count


def build_trainer(
    arguments: Arguments,
    model: PeftModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    train: Rows,
    evaluation: Dataset | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of the task. `processor` is the tokenizer, or what prepares pictures.

    It has an attribute `truncation`: what was cut from each data set (`launch.training.preparation.Truncation`).

    Raises:
        UserError: no training row has an answer within `max_length`.
    """
    common = {"model": model, "args": arguments.training, "processing_class": processor}
    if arguments.run.task in LANGUAGE:
        trainer = _language_trainer(train, evaluation, callbacks, **common)
    else:
        trainer = _head_trainer(arguments.run.task, train, evaluation, callbacks, **common)
    for callback in callbacks:
        if isinstance(callback, OptimizerGuard | PackingGuard):
            callback.trainer = trainer
        if isinstance(callback, Stopping):
            trainer.stopping = callback
    return trainer


def _language_trainer(
    train: Rows, evaluation: Dataset | None, callbacks: list[TrainerCallback], args: Any, **common: Any
) -> Trainer:
    if args.completion_only_loss is None:
        args.completion_only_loss = True
    if args.packing or args.padding_free:
        callbacks.append(PackingGuard())
    if isinstance(train, IterableDataset):
        # Every rank reads the stream and keeps its share. Otherwise one would read, and put batches of different
        # lengths into one tensor to send them to the others.
        args.accelerator_config.dispatch_batches = False
    trainer = MixtureSFTTrainer(train_dataset=train, eval_dataset=evaluation, callbacks=callbacks, args=args, **common)
    for what, rows in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if rows is not None and next(iter(rows), None) is None:
            raise UserError(f"no {what} row has an answer within --max_length {args.max_length} tokens; raise it.")
    return trainer


def _head_trainer(
    task: str, train: Dataset, evaluation: Dataset | None, callbacks: list[TrainerCallback], **common: Any
) -> Trainer:
    processor, sets, truncation = common["processing_class"], {"train": train, "eval": evaluation}, {}
    if task == "image-classification":
        sets = {name: rows and images.as_inputs(rows, processor) for name, rows in sets.items()}
        collator = images.collate
    else:
        for name, rows in sets.items():
            if rows is not None:
                sets[name], truncation[name] = tokenize_texts(rows, processor, common["args"].max_length)
        collator = DataCollatorWithPadding(processor)
    trainer = HeadTrainer(
        train_dataset=sets["train"],
        eval_dataset=sets["eval"],
        data_collator=collator,
        compute_metrics=head_scores,
        callbacks=callbacks,
        **common,
    )
    # transformers takes any forward with **kwargs for one that divides its loss by num_items_in_batch, and then
    # does not divide by the accumulation steps; classification heads return a plain mean.
    trainer.model_accepts_loss_kwargs = False
    trainer.truncation = truncation
    return trainer
