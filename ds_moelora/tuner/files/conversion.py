"""An adapter that started from singular values, rewritten as a plain mixture for the unchanged base model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..config import PATTERNS, MoELoRAConfig


def save_without_residual(model: PeftModel, folder: str, adapter_name: str = "default") -> None:
    """Writes an adapter of rank r (1 + E) that is the same function, for W0 itself: no residual, no starting factors.

        W0 + s sum_i g_i B_i A_i - (s / E) sum_j B0_j A0_j = W0 + s sum_i g_i (B_i A_i - (1 / E) sum_j B0_j A0_j)

    since the gates of a token sum to 1. Every expert therefore takes in the residual whole, as E r more columns; fewer
    would not do, for a token may give one expert any gate between 0 and 1. s stays what it was: `lora_alpha` (or `eta`)
    grows with the rank. Every rank has to call it if the experts are spread over ranks; rank 0 writes.

    Args:
        model: with the adapter, whole (not partitioned by ZeRO-3).
        folder: gets adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: the adapter has no residual.
    """
    config = model.peft_config[adapter_name]
    if not (isinstance(config, MoELoRAConfig) and config.from_svd):
        raise ValueError(
            f"adapter {adapter_name!r} did not start from singular values: it has no residual, and save_pretrained "
            "writes it as it is."
        )
    unlike = [name for name in ("shared_expert", *PATTERNS) if getattr(config, name)]
    if unlike:
        raise ValueError(
            f"adapter {adapter_name!r} has {', '.join(unlike)}: pairs of different ranks, for which this conversion is "
            "not made. Keep the adapter with its residual (save_pretrained)."
        )
    entries = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    _plain_config(config).save_pretrained(folder)
    save_file(_plain_entries(entries), Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _plain_config(config: MoELoRAConfig) -> MoELoRAConfig:
    """The same s at rank r (1 + E)."""
    times = 1 + config.num_experts
    changed: dict[str, Any] = {"r": config.r * times, "init_lora_weights": True, "rho": 10.0, "svd_cache_dir": None}
    changed["inference_mode"] = True
    if config.scaling == "goat":
        changed["eta"] = config.eta * times
    else:
        changed["lora_alpha"] = config.lora_alpha * (times if config.scaling == "alpha" else times**0.5)
    return dataclasses.replace(config, **changed)


def _plain_entries(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """lora_A: [A_i, A0_1 ... A0_E], lora_B: [B_i, -B0_1 / E ... -B0_E / E]; the start is left out."""
    plain = {}
    for key, tensor in entries.items():
        prefix, _, name = key.rpartition(".")
        if name in ("lora_A", "lora_B"):
            start = entries[f"{prefix}.initial_{name[-1]}"].to(tensor.dtype)
            common = start.permute(1, 0, 2).flatten(1) * (1.0 if name == "lora_A" else -1 / len(start))
            tensor = torch.cat([tensor, common.expand(len(tensor), -1, -1)], dim=2)
        if name not in ("initial_A", "initial_B", "base_hash"):
            plain[key] = tensor.detach().cpu().contiguous()
    return plain
