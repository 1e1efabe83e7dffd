"""The trainers: TRL's SFTTrainer and transformers' Trainer, with what a mixture needs on top."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    BaseImageProcessor,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from trl import SFTTrainer

from ds_moelora import data_only, load_elastic, save_elastic
from ds_moelora.adapters import append_experts, sharded_experts, without_experts
from ds_moelora.parallel.elastic import read_manifest, topology_changes, why_not_elastic
from launch import images
from launch.arguments import Arguments
from launch.errors import UserError

ELASTIC = "elastic"  # folder of a checkpoint


class GatheringTrainer(Trainer):
    """A Trainer that saves whole experts when they are spread over ranks (`ep_size > 1`), and resumes anywhere.

    transformers calls `_save` on every rank, but `save_pretrained`, which would gather them, on one. So it saves the
    rest, and the experts are gathered and added to the file afterwards, one factor of one layer at a time.

    Every checkpoint has an elastic part (`ELASTIC`) beside DeepSpeed's own files. In the same topology those are
    resumed, equal to the bit; in another, which DeepSpeed cannot do, the elastic part.
    """

    saves_elastic = False
    unsafe_checkpoints = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if state_dict is None or not sharded_experts(model):
            super()._save(output_dir, state_dict)
            return
        with without_experts():
            super()._save(output_dir, state_dict)
        append_experts(model, output_dir if output_dir is not None else self.args.output_dir)

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


class MixtureSFTTrainer(GatheringTrainer, SFTTrainer):
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
            counts = torch.stack([outputs.is_top1.sum(), outputs.label_mask.sum()]).unsqueeze(0)
            right, total = self.accelerator.gather_for_metrics(counts).sum(0).tolist()
            self._metrics["eval"]["mean_token_accuracy"].append(right / max(total, 1))
        return (loss, outputs) if return_outputs else loss


class OptimizerGuard(TrainerCallback):
    """Stops the run if the engine trains with another optimizer than the one that was asked for.

    Args:
        wanted: the `type` in the DeepSpeed config.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.trainer: Trainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine = self.trainer.deepspeed if self.trainer is not None else None
        if engine is None or getattr(torch.optim, self.wanted, None) is None:
            return  # DeepSpeed's own names (adamw, lamb) stand for whichever of its implementations fits the device
        running = type(engine.basic_optimizer).__name__
        if running != self.wanted:
            raise UserError(
                f"the DeepSpeed config asks for {self.wanted}, but the engine runs {running}. With offload_optimizer, "
                'add "zero_force_ds_cpu_optimizer": false to the DeepSpeed config.'
            )


def tokenize_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`text` (and `text_pair`) as token ids, cut at `max_length`."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    return rows.map(
        lambda batch: tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=columns,
        desc="Tokenizing",
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose most probable class is the label."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


def build_trainer(
    arguments: Arguments,
    model: PeftModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    train: Dataset,
    evaluation: Dataset | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of the task. `processor` is the tokenizer, or what prepares pictures.

    Raises:
        UserError: no training row has an answer within `max_length`.
    """
    training = arguments.training
    common = {"model": model, "args": training, "processing_class": processor, "callbacks": callbacks}
    if arguments.run.task == "causal-lm":
        training.completion_only_loss = True
        trainer: Trainer = MixtureSFTTrainer(train_dataset=train, eval_dataset=evaluation, **common)
        if len(trainer.train_dataset) == 0:
            raise UserError(
                f"no training row has an answer within --max_length {training.max_length} tokens; raise it."
            )
    else:
        if arguments.run.task == "image-classification":
            prepare, collator = partial(images.as_inputs, processor=processor), images.collate
        else:
            prepare = partial(tokenize_texts, tokenizer=processor, max_length=training.max_length)
            collator = DataCollatorWithPadding(processor)
        trainer = GatheringTrainer(
            train_dataset=prepare(train),
            eval_dataset=None if evaluation is None else prepare(evaluation),
            data_collator=collator,
            compute_metrics=accuracy,
            **common,
        )
        # transformers takes any forward with **kwargs for one that divides its loss by num_items_in_batch, and then
        # does not divide by the accumulation steps; classification heads return a plain mean.
        trainer.model_accepts_loss_kwargs = False
    trainer.unsafe_checkpoints = arguments.run.unsafe_checkpoints
    for callback in callbacks:
        if isinstance(callback, OptimizerGuard):
            callback.trainer = trainer
    return trainer
