"""Tokenizer, model and adapter: first looked over without weights, then loaded."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

import ds_moelora
from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import AdapterArguments
from launch.data.image_text import outside_text
from launch.data.images import head_name
from launch.training import quantization

AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "image-text-to-text": AutoModelForImageTextToText,
}
# PEFT's wrappers for a task expect text; a model of pictures is wrapped as it is.
TASK_TYPES = {
    "causal-lm": TaskType.CAUSAL_LM,
    "sequence-classification": TaskType.SEQ_CLS,
    "image-classification": None,
    "image-text-to-text": TaskType.CAUSAL_LM,
}
PATTERNS = ("rank_pattern", "alpha_pattern", "num_experts_pattern", "top_k_pattern")
SHOWN_NAMES = 12


def load_tokenizer(arguments: Arguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: no tokenizer there, or none that ends and pads sequences.
    """
    run = arguments.run
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            run.model_name_or_path, revision=run.revision, trust_remote_code=arguments.training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {run.model_name_or_path}: no tokenizer: {error}") from error
    return complete_tokenizer(tokenizer, run.task, str(run.model_name_or_path))


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, task: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token; `name` is the model's, for messages."""
    if task == "causal-lm" and tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token; set eos_token in it.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has no padding token; set pad_token in it.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapter_config(adapter: AdapterArguments, task: str) -> Any:
    """The `MoELoRAConfig` that the flags describe.

    Raises:
        UserError: a value outside its bounds.
    """
    # A single plain name means "modules called so"; a string would be a regular expression for the full path.
    targets: Any = adapter.target_modules
    if targets == ["all-linear"] or _is_pattern(targets):
        targets = targets[0]
    try:
        return ds_moelora.MoELoRAConfig(
            task_type=TASK_TYPES[task],
            r=adapter.r,
            num_experts=adapter.num_experts,
            top_k=adapter.top_k,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            target_modules=targets,
            scaling=adapter.scaling,
            eta=adapter.eta,
            rho=adapter.rho,
            svd_cache_dir=adapter.svd_cache_dir,
            init_lora_weights={"true": True, "false": False}.get(
                adapter.init_lora_weights.lower(), adapter.init_lora_weights
            ),
            router_aux_loss_coef=adapter.router_aux_loss_coef,
            router_z_loss_coef=adapter.router_z_loss_coef,
            router_temperature=adapter.router_temperature,
            router_jitter=adapter.router_jitter,
            top_p=adapter.top_p,
            shared_expert=adapter.shared_expert,
            shared_A=adapter.shared_A,
            **{name: _read_pattern(name, getattr(adapter, name)) for name in PATTERNS},
            ep_size=adapter.ep_size,
            ep_dispatch=adapter.ep_dispatch,
            expert_compute=adapter.expert_compute,
            modules_to_save=adapter.modules_to_save or None,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {error}") from error


def _is_pattern(targets: list[str]) -> bool:
    """Whether `--target_modules` is one regular expression for full names."""
    return len(targets) == 1 and re.fullmatch(r"[\w.-]+", targets[0]) is None


def _read_pattern(flag: str, value: Any) -> Any:
    """A pattern from the command line (JSON) or a recipe (a mapping, as it is); {} without one."""
    if not isinstance(value, str):
        return value or {}
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"--{flag} {value} is not JSON ({error}); write e.g. '{{\"q_proj\": 4}}'.") from error


def check_model(arguments: Arguments, config: Any, model_options: dict[str, Any]) -> None:
    """Builds the model without weights and puts the adapter on it, so that a wrong target shows within a second.

    For pictures it completes `config` by the classification layer, or by the part of the model that stays frozen.

    Raises:
        UserError: the model's config cannot be read, or the adapter does not fit the model.
    """
    skeleton = build_on_meta(arguments, model_options)
    names = linear_names(skeleton)
    if arguments.run.task == "image-classification":
        _train_head(config, head_name(skeleton))
    elif arguments.run.task == "image-text-to-text" and not _is_pattern(arguments.adapter.target_modules):
        config.exclude_modules = outside_text(skeleton)
    modules = [name for name, _ in skeleton.named_modules()]
    for wish in arguments.adapter.modules_to_save:
        if not any(name == wish or name.endswith(f".{wish}") for name in modules):
            near = difflib.get_close_matches(wish, {name.rpartition(".")[2] for name in modules}, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--modules_to_save {wish}: the model has no such module.{hint}")
    try:
        get_peft_model(skeleton, config)
    except (ValueError, NotImplementedError) as error:
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        raise UserError(
            f"--target_modules {' '.join(arguments.adapter.target_modules)}: {error} "
            f"Linear layers of this model are called: {shown}."
        ) from error


def _train_head(config: Any, head: str) -> None:
    """The new classification layer is trained and saved whole, not adapted; PEFT does the same for text by itself."""
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), head]))
    if config.target_modules == "all-linear":
        config.exclude_modules = rf"(.*\.)?{head}(\..*)?"


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers, each once, in the model's order."""
    found = [name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    return list(dict.fromkeys(found))


def build_on_meta(arguments: Arguments, model_options: dict[str, Any]) -> PreTrainedModel:
    """The model without weights.

    Raises:
        UserError: its config cannot be read, or is of no model for the task.
    """
    run, trust = arguments.run, arguments.training.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(
            run.model_name_or_path, revision=run.revision, trust_remote_code=trust, **model_options
        )
        with torch.device("meta"):
            return AUTO_CLASSES[run.task].from_config(config, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name_or_path {run.model_name_or_path}: {error}") from error


def load_model(arguments: Arguments, config: Any, model_options: dict[str, Any], processor: Any) -> PeftModel:
    """The model with its weights and a fresh adapter. Call it after `training.start()`: ZeRO-3 shards while loading."""
    run, training = arguments.run, arguments.training
    # In fp32 unless mixed precision was asked for: a checkpoint's own bf16 would train the adapter in bf16 unasked.
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    model = AUTO_CLASSES[run.task].from_pretrained(
        run.model_name_or_path,
        revision=run.revision,
        trust_remote_code=training.trust_remote_code,
        dtype=dtype,
        **model_options,
        **quantization.loading_options(run.load_in_4bit, dtype),
    )
    if isinstance(processor, PreTrainedTokenizerBase) and model.config.pad_token_id is None:
        model.config.pad_token_id = processor.pad_token_id
    model = get_peft_model(model, config)
    if run.load_in_4bit:
        quantization.settle(model)
    return model
