"""Frozen base weights in 4 bits, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from launch.checks.errors import local_rank


def loading_options(load_in_4bit: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs for a base in NF4 that computes in `dtype`; {} without it."""
    if not load_in_4bit:
        return {}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    device = local_rank() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def settle(model: nn.Module) -> None:
    """Keeps 4-bit weights in the layout that training reads, and the adapter in the run's own precision.

    On CPUs with AVX-512 bitsandbytes repacks a weight the first time that it is used without gradients (an evaluation),
    and the layout that it then has cannot be dequantised for the backward pass of the next step. TRL casts the
    adapter of a model with `is_loaded_in_4bit` to bf16, whatever precision was asked for.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.is_loaded_in_4bit = False
