"""What an adapter was trained with, in its adapter_config.json: train.py writes it, the other programs read it.

    "trained_with": {"prompt_template": "chat", "max_length": 224, "precision": "bf16", "data": [...],
                     "optimizer": "GateRiemannianAdamW", "optimizer_settings": {"damping": 1e-06, ...}, ...}

An adapter that is read otherwise than it was trained gives worse scores and says nothing. The file may be anybody's:
`Trained` takes what it understands, and nothing in it is executed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerState

from ds_moelora.checkpoint.record import optimizer_settings
from ds_moelora.monitoring.run_info import basic_optimizer
from ds_moelora.redaction import redact, redact_text
from launch.checks.arguments import Arguments
from launch.checks.flags import FORMATS, NO_TEMPLATE, TEMPLATES

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHOWN = "trained_with"


@dataclass(frozen=True)
class Trained:
    """What matters to whoever uses an adapter; None: not known.

    Args:
        prompt_template: one of `launch.checks.flags.TEMPLATES`, or `NO_TEMPLATE`: rows had prompts of their own.
        max_length: tokens. precision: a key of `PRECISIONS`.
        formats: the Jinja templates of `--prompt_format` and `--completion_format`, as text.
    """

    prompt_template: str | None = None
    max_length: int | None = None
    precision: str | None = None
    formats: tuple[str, ...] = ()

    @classmethod
    def read(cls, record: Any) -> Trained:
        """Of a file's `trained_with`; what is of another kind is left out."""
        record = record if isinstance(record, dict) else {}
        template, length, precision = (record.get(name) for name in ("prompt_template", "max_length", "precision"))
        return cls(
            template if template in (*TEMPLATES, NO_TEMPLATE) else None,
            length if isinstance(length, int) and not isinstance(length, bool) and length >= 1 else None,
            precision if isinstance(precision, str) and precision in PRECISIONS else None,
            tuple(f"--{name} {record[name]!r:.200}" for name in FORMATS if isinstance(record.get(name), str)),
        )


def settle_template(wish: str | None, trained: Trained, default: str) -> str:
    """The template that prompts get: the one asked for, the one trained with, or `default`; a difference is said."""
    known = trained.prompt_template
    if wish is None:
        return known if known not in (None, NO_TEMPLATE) else default
    if known is not None and wish != known:
        note(f"--prompt_template {wish}: this adapter was trained with {known}, and is used otherwise now.")
    return wish


def note(text: str) -> None:
    """One line beside the results, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Remember(TrainerCallback):
    """Writes the record into the model's adapter configuration as training begins, so that every save has it."""

    def __init__(self, trainer: Trainer, arguments: Arguments, optimizer: str) -> None:
        self.trainer, self.arguments, self.optimizer = trainer, arguments, optimizer
        self.record: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        running = basic_optimizer(self.trainer.deepspeed or self.trainer.optimizer)
        self.record |= record_of(self.arguments, self.optimizer, running, state)
        if self.trainer.deepspeed is not None:
            self.record["zero_stage"] = self.trainer.deepspeed.zero_optimization_stage()
        model: PeftModel = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for config in model.peft_config.values():
            if hasattr(config, SHOWN):  # PEFT's LoRA has no such field: train_summary.json has it
                setattr(config, SHOWN, self.record)


def record_of(arguments: Arguments, name: str, optimizer: Any, state: TrainerState) -> dict[str, Any]:
    """Everything about a run that its adapter should tell, as plain values without secrets."""
    run, training = arguments.run, arguments.training
    record: dict[str, Any] = {
        "task": run.task,
        "prompt_template": run.template_used,
        "max_length": getattr(training, "max_length", None),
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        "load_in_4bit": run.load_in_4bit,
        "data": ["demo"] if arguments.demo else [redact_text(data) for data in run.dataset_name],
        "packing": getattr(training, "packing", False),
        "optimizer": name,
        "optimizer_settings": optimizer_settings(optimizer),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        "warmup_steps": training.get_warmup_steps(state.max_steps),
        "max_grad_norm": training.max_grad_norm,
        "rows_per_step": training.per_device_train_batch_size * training.gradient_accumulation_steps
        * training.world_size,
        "steps": state.max_steps,
        "processes": training.world_size,
        "seed": training.seed,
    }  # fmt: skip
    record |= {name: getattr(run, name) for name in FORMATS if getattr(run, name) is not None}
    return redact(record)


def precision_of(record: dict[str, Any]) -> str:
    """For people."""
    return record["precision"] + (", base in 4 bits" if record["load_in_4bit"] else "")
