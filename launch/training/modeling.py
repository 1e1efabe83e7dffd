"""Tokenizer, model and adapter: first looked over without weights, then loaded."""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

import ds_moelora
from ds_moelora.tuner.flags import config_from_flags, is_pattern
from launch.checks.arguments import Arguments, non_defaults
from launch.checks.errors import UserError, local_rank, say
from launch.checks.flags import AdapterArguments
from launch.data.pictures import head_name, outside_text
from launch.training import base_experts
from launch.training.processors import tokenizer_of

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
# Of an adapter that is trained further: what is this run's own choice, not part of what was saved.
OF_THE_RUN = (
    *("lora_dropout", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter", "ep_size", "ep_dispatch"),
    *("expert_compute", "svd_cache_dir"),
)
# PEFT trains these whole (`pre_classifier` of DistilBERT, too), and adapts a layer of one nevertheless.
TEXT_HEADS = r"(.*\.)?\w*(classifier|score)(\..*)?"
SET_BY_FLAGS = {
    "revision": "--revision",
    "trust_remote_code": "--trust_remote_code",
    "quantization_config": "--load_in_4bit",
    "load_in_4bit": "--load_in_4bit",
    "device_map": "the launcher: one device per process",
    "num_labels": "the data's classes",
    "state_dict": "the checkpoint",
    "config": "--model_name_or_path",
}
# What `from_pretrained` takes that is no part of a model's config.
FOR_LOADING = (
    *("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "use_safetensors", "variant"),
    *("subfolder", "cache_dir", "local_files_only", "token", "force_download", "proxies", "low_cpu_mem_usage"),
    *("use_kernels", "key_mapping", "weights_only", "max_memory", "offload_folder", "ignore_mismatched_sizes"),
)


def start_adapter(arguments: Arguments) -> Any:
    """The configuration of the adapter that `--model_name_or_path` names, replaced by its base; None: it is none."""
    run, folder = arguments.run, arguments.run.model_name_or_path
    if folder is None or not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        return None
    if os.path.isfile(os.path.join(folder, "config.json")):
        return None  # a model with an adapter beside it
    where = f"--model_name_or_path {folder} is an adapter"
    try:
        saved = PeftConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{where} whose adapter_config.json cannot be read: {error}") from error
    if not isinstance(saved, ds_moelora.MoELoRAConfig):
        raise UserError(f"{where} of another kind ({saved.peft_type}). Merge it into its base, and train on that.")
    if not saved.base_model_name_or_path:
        raise UserError(f"{where} that does not name its base model; write base_model_name_or_path into its config.")
    wished = adapter_config(arguments.adapter, run.task)
    for name, given in non_defaults(arguments.adapter).items():
        kept, value = getattr(saved, name), getattr(wished, name)
        if name in OF_THE_RUN:
            setattr(saved, name, value)
        elif value != kept:
            raise UserError(
                f"{where} with {name} {kept}, and --{name} {given} would make another one. Leave the flag out, or name "
                "a base model."
            )
    say(f"Training goes on with the adapter in {folder}, on its base {saved.base_model_name_or_path}.")
    run.start_adapter, run.model_name_or_path = folder, saved.base_model_name_or_path
    run.revision = saved.revision or run.revision
    saved.inference_mode = False
    return saved


def adapter_config(adapter: AdapterArguments, task: str) -> Any:
    """The `MoELoRAConfig` that the flags describe."""
    try:
        return config_from_flags(vars(adapter), task_type=TASK_TYPES[task])
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {error}") from error


def check_model(arguments: Arguments, config: Any, skeleton: PreTrainedModel) -> PeftModel:
    """Puts the adapter on the model without weights, so that a wrong target shows within a second.

    For pictures it completes `config` by the classification layer, or by the part of the model that stays frozen.
    """
    run = arguments.run
    base_experts.name_experts(config, skeleton)
    if run.task == "image-classification":
        # The new layer is trained and saved whole, not adapted; PEFT does the same for text by itself.
        head = head_name(skeleton)
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), head]))
        if config.target_modules == "all-linear":
            config.exclude_modules = rf"(.*\.)?{head}(\..*)?"
    elif run.task == "image-text-to-text" and not is_pattern(arguments.adapter.target_modules):
        config.exclude_modules = outside_text(skeleton)
    elif run.task == "sequence-classification" and config.target_modules == "all-linear":
        config.exclude_modules = TEXT_HEADS
    modules = [name for name, _ in skeleton.named_modules()]
    for wish in arguments.adapter.modules_to_save:
        if not any(name == wish or name.endswith(f".{wish}") for name in modules):
            near = difflib.get_close_matches(wish, {name.rpartition(".")[2] for name in modules}, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"--modules_to_save {wish}: the model has no such module.{hint}")
    try:
        adapted = get_peft_model(skeleton, config)
    except Exception as error:  # of whatever class: it is about this model and these targets
        targets = run.start_adapter or f"--target_modules {' '.join(arguments.adapter.target_modules)}"
        raise UserError(f"{targets}: {error}") from error
    _start_from_lora(run, adapted)
    return adapted


def _start_from_lora(run: Any, model: PeftModel) -> None:
    """Does what `--init_from_lora` asks; on a model without weights it only checks."""
    if run.init_from_lora is None:
        return
    if run.start_adapter or run.target_parameters:
        other = "an adapter as --model_name_or_path" if run.start_adapter else "--target_parameters"
        raise UserError(f"--init_from_lora {run.init_from_lora} has no effect with {other}; leave one of them out.")
    try:
        layers = ds_moelora.start_from_lora(model, run.init_from_lora)
    except ValueError as error:
        raise UserError(f"--init_from_lora: {error}") from error
    if not next(model.parameters()).is_meta:
        say(f"Every expert of {layers} layers starts as the LoRA in {run.init_from_lora}.")


def loading_options(arguments: Arguments) -> dict[str, Any]:
    """What `--model_init_kwargs` and `--attn_implementation` give to `from_pretrained`."""
    given = arguments.training.model_init_kwargs or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UserError(f"--model_init_kwargs {given} is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise UserError(f"--model_init_kwargs {given} is no JSON object {{...}}.")
    for name, flag in SET_BY_FLAGS.items():
        if name in given:
            raise UserError(f"--model_init_kwargs: {name} is set by {flag}.")
    wish = arguments.run.attn_implementation
    if wish is not None and given.get("attn_implementation", wish) != wish:
        raise UserError(f"--attn_implementation {wish} and --model_init_kwargs disagree; keep one of them.")
    return {**given, **({} if wish is None else {"attn_implementation": wish})}


def build_on_meta(arguments: Arguments, model_options: dict[str, Any]) -> PreTrainedModel:
    """The model without weights. Options for loading that the model's config does not know are checked, too."""
    run, trust = arguments.run, arguments.training.trust_remote_code
    options = loading_options(arguments)
    try:
        config = AutoConfig.from_pretrained(run.model_name_or_path, revision=run.revision, trust_remote_code=trust)
        built_for = (config.architectures or [""])[0]
        if run.task == "causal-lm" and built_for.endswith("ForMaskedLM"):
            raise UserError(f"{built_for} sees what comes after a token, which --task causal-lm has it predict.")
        outputs, needed = config.num_labels, model_options.get("num_labels", config.num_labels)
        if needed != outputs:
            # A head for other classes takes the place of the checkpoint's, whose rows it cannot use.
            model_options["ignore_mismatched_sizes"] = True
            if built_for.endswith("Classification"):
                say(f"The model's head has {outputs} outputs, and the data needs {needed}: a new head is trained.")
        for name, value in (options | model_options).items():
            if name in FOR_LOADING:
                continue
            if not hasattr(config, name):
                raise UserError(f"--model_init_kwargs: {name} is neither in this model's config nor for loading it.")
            setattr(config, name, value)
        attention = {name: options[name] for name in ("attn_implementation",) if name in options}
        with torch.device("meta"):
            return AUTO_CLASSES[run.task].from_config(config, trust_remote_code=trust, **attention)
    except UserError:
        raise
    except Exception as error:  # a config of another kind can raise anything
        raise UserError(f"--model_name_or_path {run.model_name_or_path}: {_first_lines(error)}") from error


def _first_lines(error: Exception) -> str:
    """An error without the list of all classes that transformers adds."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."


def load_base(task: str, name: str, processor: Any, **options: Any) -> Any:
    """A base model with its weights, which pads with the tokenizer's token if it has none of its own."""
    try:
        model = AUTO_CLASSES[task].from_pretrained(name, **options)
    except Exception as error:  # damaged files can raise anything
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {_first_lines(error)}") from error
    tokenizer, config = tokenizer_of(processor), model.config.get_text_config()
    if tokenizer is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model


def load_model(arguments: Arguments, config: Any, model_options: dict[str, Any], processor: Any) -> PeftModel:
    """The model with its weights, and a fresh adapter or the one that training goes on with.

    Call it after `training.start()`: ZeRO-3 shards while loading.
    """
    run, training = arguments.run, arguments.training
    # In fp32 unless mixed precision was asked for: a checkpoint's own bf16 would train the adapter in bf16 unasked.
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    options = {"dtype": dtype, **loading_options(arguments), **model_options}
    options |= {"revision": run.revision, "trust_remote_code": training.trust_remote_code}
    if run.load_in_4bit:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        device = local_rank() if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": nf4, "device_map": {"": device}}
    model = load_base(run.task, run.model_name_or_path, processor, **options)
    try:
        if run.start_adapter is None:
            model = get_peft_model(model, config)
        else:
            model = PeftModel.from_pretrained(model, run.start_adapter, is_trainable=True, config=config)
    except Exception as error:
        which = run.start_adapter or "a new adapter"
        raise UserError(f"{which} does not fit {run.model_name_or_path}: {_first_lines(error)}") from error
    _start_from_lora(run, model)
    if run.load_in_4bit:
        _settle_4bit(model)
    if getattr(config, "target_parameters", None):
        base_experts.settle(model)
    return model


def _settle_4bit(model: PeftModel) -> None:
    """Keeps 4-bit weights in the layout that training reads, and the adapter in the run's own precision.

    On CPUs with AVX-512 bitsandbytes repacks a weight the first time that it is used without gradients (an evaluation),
    and the layout that it then has cannot be dequantised for the backward pass of the next step. TRL casts the
    adapter of a model with `is_loaded_in_4bit` to bf16, whatever precision was asked for.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = False
