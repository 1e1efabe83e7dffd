"""A trained adapter and its base model for inference; needs no DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn

import ds_moelora  # noqa: F401  (so that PEFT knows the adapter)
from launch.checks.errors import UserError
from launch.checks.flags import SCORED_TASKS, flag
from launch.data.classification import class_options
from launch.training import processors
from launch.training.fit import check_weights
from launch.training.modeling import TASK_TYPES, load_base
from launch.training.processors import Processor
from launch.training.remembered import PRECISIONS, SHOWN, Trained
from launch.training.report import SUMMARY_NAME

DTYPES = ["auto", "float32", "bfloat16", "float16"]
NO_ADAPTER = "none"


@dataclass
class SourceArguments:
    """Flags of `launch/evaluate.py` and `launch/generate.py`: which adapter on which base model."""

    adapter: str | None = flag(None, "The adapter: a folder or a hub id; none: the base model alone.")
    model_name_or_path: str | None = flag(None, "Base model. Default: the one that the adapter names.")
    revision: str = flag("main", "Branch, tag or commit of a model from the hub.")
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the base model; auto: as it was trained, or where that is not known bfloat16 where a GPU has "
            "it, else float32.",
            "choices": DTYPES,
        },
    )
    attn_implementation: str | None = flag(None, "The model's attention: eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = flag(False, "Run code that a model's repository brings. Off unless you trust it.")
    show_traceback: bool = flag(False, "Show the traceback of errors that are otherwise one message.")


@dataclass
class Source:
    """What to load: the flags, completed by what was saved beside the adapter.

    Args:
        adapter: a folder or hub id; None: the base model alone. base: a folder or hub id.
        task: one of `launch.checks.flags.SCORED_TASKS`.
        dtype: of the base model's weights; the adapter's stay as they were saved.
        classes: names of the classes in the order of their ids; [] for the base's own, or without classes.
        regression: one output, a number. trained: what the adapter was trained with.
    """

    flags: SourceArguments
    adapter: str | None
    base: str
    task: str
    dtype: torch.dtype
    classes: list[str]
    regression: bool = False
    trained: Trained = field(default_factory=Trained)


def find_source(flags: SourceArguments, task: str | None, classes: list[str] | None = None) -> Source:
    """Completes what the flags left out; loads no weights.

    Args:
        task: None: the adapter's.
        classes: None or []: those in train_summary.json, in the adapter's folder or (for a checkpoint) the one above.
    """
    adapter, regression, classes = flags.adapter, False, classes or []
    if not adapter:
        raise UserError("--adapter is missing: a folder, a hub id, or none for the base model alone.")
    saved = None if adapter.lower() == NO_ADAPTER else _adapter_config(adapter)
    base = flags.model_name_or_path or (saved.base_model_name_or_path if saved else None)
    if not base:
        whose = f"{adapter} does not name its base model" if saved else "--adapter none"
        raise UserError(f"{whose}: pass --model_name_or_path.")
    if task is None:
        fitting = (name for name in SCORED_TASKS if TASK_TYPES[name] == saved.task_type)  # as text it is equal, too
        task = next(fitting, None) if saved else "causal-lm"
        if task is None:
            raise UserError(f"{adapter} is for {saved.task_type}; choose with --task how to score it.")
    places = [folder / SUMMARY_NAME for folder in (Path(adapter), Path(adapter).parent)] if saved else []
    summary = next((json.loads(file.read_text()) for file in places if file.is_file()), {})
    trained = Trained.read(getattr(saved, SHOWN, None) or summary.get(SHOWN))
    if saved and task != "causal-lm" and not classes:
        regression, classes = bool(summary.get("regression")), summary.get("classes") or []
        if not classes and not regression:
            raise UserError(
                f"{adapter} has no {SUMMARY_NAME} with its classes: pass --classes, in the order of their ids "
                "(a run of launch/train.py writes that file at its end)."
            )
    dtype = _dtype(flags.dtype, trained)
    return Source(flags, adapter if saved else None, base, task, dtype, classes, regression, trained)


def _adapter_config(adapter: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if Path(adapter).is_dir():
            raise UserError(f"--adapter {adapter}: no adapter_config.json that can be read: {error}") from error
        raise UserError(f"--adapter {adapter}: no such folder, and not on the hub: {error}") from error


def _dtype(name: str, trained: Trained) -> torch.dtype:
    if name == "auto" and trained.precision is not None:
        name = PRECISIONS[trained.precision]
    elif name == "auto":
        name = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def load_processor(source: Source) -> Processor:
    """The tokenizer (or what prepares pictures) that was saved with the adapter, otherwise the base model's."""
    flags = source.flags
    return processors.load_processor(source.base, source.task, flags.trust_remote_code, flags.revision, source.adapter)


def load_for_inference(source: Source, processor: Processor) -> nn.Module:
    """The base model with its adapter, in eval mode, on the accelerator if there is one."""
    check_weights(source.base, "--model_name_or_path")
    check_weights(source.adapter, "--adapter")
    options: dict[str, Any] = {}
    if source.regression or source.classes:
        # The adapter brings its own head.
        options = {"ignore_mismatched_sizes": source.adapter is not None, **class_options(source.classes)}
    if source.flags.attn_implementation is not None:
        options["attn_implementation"] = source.flags.attn_implementation
    options |= {"revision": source.flags.revision, "trust_remote_code": source.flags.trust_remote_code}
    model = load_base(source.task, source.base, processor, dtype=source.dtype, **options)
    if source.adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, source.adapter)
        except Exception as error:
            raise UserError(f"--adapter {source.adapter} does not fit {source.base}: {error}") from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval()


def quieten() -> None:
    """One progress bar, that of the work itself; deprecation warnings inside the libraries are for their authors."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # A head that the base lacks is the adapter's; without it PEFT's loading stops.
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def inference_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Mixed precision where the base is in 16 bits: PEFT keeps adapters, and heads saved with them, in float32."""
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        yield
