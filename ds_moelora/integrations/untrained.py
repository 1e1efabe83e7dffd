"""An adapter folder that has not been trained, for front ends that make no mixture but go on with a saved adapter.

LLaMA-Factory's `adapter_name_or_path`, ms-swift's `--adapters` and axolotl's `lora_model_dir` end in
`PeftModel.from_pretrained(model, folder, is_trainable=True)`, which is all that a mixture needs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    set_seed,
)

from ..tuner import MoELoRAConfig

# Task -> class of the base model, and PEFT's name of the task.
TASKS: dict[str, tuple[Any, TaskType]] = {
    "causal-lm": (AutoModelForCausalLM, TaskType.CAUSAL_LM),
    "sequence-classification": (AutoModelForSequenceClassification, TaskType.SEQ_CLS),
    "image-text-to-text": (AutoModelForImageTextToText, TaskType.CAUSAL_LM),
}


def init_adapter(
    model: str,
    config: MoELoRAConfig,
    output: str,
    task: str = "causal-lm",
    seed: int = 42,
    dtype: str = "auto",
    **hub: Any,
) -> dict[str, int]:
    """Saves the adapter that `get_peft_model(base, config)` starts with after `torch.manual_seed(seed)`.

    The base model's weights are read only where the start needs them: singular values, or `modules_to_save`. Else a
    tensor without memory of its own stands for each.

    Args:
        model: folder or hub id of the base model.
        config: the mixture; `target_modules` and `base_model_name_or_path` are filled in.
        output: folder to write; must not exist, or be empty.
        task: of `TASKS`. seed: of the random factors.
        dtype: of the base weights where they are read; "auto": as they are stored.
        hub: revision, trust_remote_code.

    Returns:
        {"modules": adapted modules, "parameters": elements of the adapter}.

    Raises:
        ValueError: an unknown task or dtype, a folder that is not empty, a base model that cannot be read, or targets
            that do not fit it.
    """
    if task not in TASKS:
        raise ValueError(f"--task {task} is unknown; use one of {', '.join(TASKS)}.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype} is unknown; use auto, float32, bfloat16 or float16.")
    if os.path.lexists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise ValueError(f"--output {output} is there and not an empty folder; name another one, or remove it.")
    auto_class, config.task_type = TASKS[task]
    try:
        if config.from_svd or config.modules_to_save:
            base = auto_class.from_pretrained(model, dtype=dtype, **hub)
        else:
            base = _without_weights(auto_class, model, hub)
    except (OSError, KeyError) as error:
        raise ValueError(f"--model {model} cannot be loaded: {error}") from error
    set_seed(seed)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(output)
    names = [name for name, module in adapted.named_modules() if name.endswith(".moelora_experts")]
    return {"modules": len(names), "parameters": adapted.get_nb_trainable_parameters()[0]}


def _without_weights(auto_class: Any, name: str, hub: dict[str, Any]) -> nn.Module:
    """The model, each of whose weights is a single zero that is seen in all places."""
    config = AutoConfig.from_pretrained(name, **hub)
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=hub.get("trust_remote_code", False))
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight not in stand_ins:
                zero = torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape)
                stand_ins[weight] = nn.Parameter(zero, requires_grad=False)
            setattr(module, key, stand_ins[weight])
    return model
