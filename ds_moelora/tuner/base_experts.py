"""LoRA on the stacked experts of a MoE base model: PEFT's `target_parameters`.

PEFT wraps a parameter (E, in, out) or (E, out, in) in a `ParamWrapper`; those of one module are nested.
Its lora_A is (E r, in), expert e's rows are e r ... e r + r - 1; its lora_B is (out, E r), expert e's columns are
e, e + E, e + 2 E, ... `check_layout` asks the installed PEFT whether that is so.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..pairs import GateSettings


def factors(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A as (E, r, in) and B as (E, out, r): views of PEFT's parameters."""
    A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    E, r = wrapper.num_experts, wrapper.r[adapter]
    return A.reshape(E, r, -1), B.reshape(-1, r, E).permute(2, 0, 1)


@functools.cache
def check_layout() -> None:
    """Compares `factors` with the weights that PEFT computes from a small layer's.

    Raises:
        ValueError: they differ.
    """
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3, 5, 4))
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        wrapper = ParamWrapper(module, "probe", parameter_name="weight", config=config, r=2, lora_alpha=2)
    A, B = factors(wrapper, "probe")
    found, ours = wrapper.get_delta_weight("probe"), B @ A
    if not any(found.shape == w.shape and torch.allclose(found, w, atol=1e-5) for w in (ours, ours.mT)):
        raise ValueError(
            f"PEFT {metadata.version('peft')} keeps the factors of stacked experts in another layout than 0.18 to "
            "0.22: install one of these, or leave out target_parameters."
        )


def gate_of(base: nn.Module) -> GateSettings | None:
    """The gate settings of an experts module whose backward pass follows them; None for others."""
    return None
