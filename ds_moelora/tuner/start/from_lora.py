"""Experts that start from an existing PEFT LoRA: every one computes its product, and so does the mixture.

Gates of a token add up to 1 (`mixture.routing.route`), so that with s B_i A_i = s_0 B_0 A_0 for all i

    y = W x + s sum_i g_i B_i A_i x = W x + s_0 B_0 A_0 x

whatever the router says. The experts drift apart as soon as they see different tokens. With r above the LoRA's rank
the further columns of A keep their random start and those of B are zero, which adds nothing either.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from ...checkpoint.processes import gathered
from ..files.adapter_file import MODEL_PREFIX, check_weights_file, saved_fields
from ..layer import MoELoRALayer

# What a LoRA may have besides A and B, and what it is called.
OTHERS = {"use_dora": "DoRA", "rank_pattern": "ranks per layer", "alpha_pattern": "alphas per layer"}


@torch.no_grad()
def start_from_lora(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> int:
    """Gives all experts of an adapter the product of a saved LoRA. Call it before the optimizer is built.

    Args:
        model: with a fresh MoE-LoRA adapter. folder: where PEFT saved the LoRA.
        adapter_name: the mixture's.

    Returns:
        The number of layers that start so; the mixture's other layers start as they would without.

    Raises:
        ValueError: no plain LoRA; a module of it that the mixture leaves out, or of another shape; a rank above r; an
            adapter that starts from singular values.
    """
    scaling, factors = _read_file(folder)
    layers = {
        name.removeprefix(MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, MoELoRALayer) and adapter_name in module.moelora_experts
    }
    lacking = sorted(factors.keys() - layers.keys())
    if lacking:
        raise ValueError(
            f"{folder} adapts {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}, and the mixture does not: "
            "its part would be lost. Add these modules to target_modules."
        )
    for name, (A_0, B_0) in factors.items():
        experts = layers[name].experts(adapter_name)
        if experts.residual is not None:
            raise ValueError(f"{name} starts from singular values; use init_lora_weights=True to start from {folder}.")
        (rank, wide), out = A_0.shape, B_0.shape[0]
        A, B = experts.factors()
        shape = getattr(A, "ds_shape", A.shape), getattr(B, "ds_shape", B.shape)
        if rank > experts.rank:
            raise ValueError(f"{folder} has rank {rank}, more than r={experts.rank} of {name}; use r={rank} or more.")
        if (wide, out) != (shape[0][1], shape[1][1]):
            raise ValueError(f"{name}: {folder} is for {wide} -> {out} features, and this model's are "
                             f"{shape[0][1]} -> {shape[1][1]}. It is of another base model.")  # fmt: skip
        with gathered([A, B], modify=True):
            A[..., :rank] = A_0.T.to(A)
            B.zero_()
            B[..., :rank] = (B_0.double() * (scaling / experts.scaling)).to(B)
    return len(factors)


def _read_file(folder: str | os.PathLike[str]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """s_0, and {module: (A_0, B_0)}: (r, in) and (out, r)."""
    fields = saved_fields(folder)
    where = f"{folder} is no LoRA to start from"
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{where}: its peft_type is {fields.get('peft_type')!r:.80}. Name the folder of a PEFT LoRA.")
    for name, what in OTHERS.items():
        if fields.get(name):
            raise ValueError(f"{where}: it has {what} ({name}), which experts do not have.")
    if fields.get("bias", "none") != "none" or fields.get("modules_to_save"):
        raise ValueError(f"{where}: it trains biases or whole modules too. Merge those into the base model first.")
    file = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    check_weights_file(file)
    config = LoraConfig(r=fields["r"], lora_alpha=fields["lora_alpha"], use_rslora=bool(fields.get("use_rslora")))
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118  (no mapping)
            module, _, factor = key.removeprefix(MODEL_PREFIX).removesuffix(".weight").rpartition(".")
            if factor not in ("lora_A", "lora_B"):
                raise ValueError(f"{where}: it has {key}, which is neither lora_A nor lora_B of a linear module.")
            found.setdefault(module, {})[factor] = opened.get_tensor(key)
    wrong = [name for name, pair in found.items() if len(pair) != 2 or any(t.dim() != 2 for t in pair.values())]
    if wrong or not found:
        raise ValueError(f"{where}: {wrong[0] if wrong else 'no module'} has a matrix lora_A and a matrix lora_B.")
    return scaling, {name: (pair["lora_A"], pair["lora_B"]) for name, pair in found.items()}
