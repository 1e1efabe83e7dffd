"""Checks before a model is changed, saved or loaded: what PEFT would let pass in silence, or stop at halfway."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .targets import candidates

_OURS = ".moelora_experts."
OUR_NAMES = {"router", "lora_A", "lora_B", "weight", "bias", "base_layer", "moelora_experts"}
OUR_NAMES |= {"shared", "shard", "deepspeed_moe", "experts", "deepspeed_experts"}


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuses an adapter name that is also a part of a parameter's name.

    PEFT tells adapters apart by looking for ".name." anywhere in a key: saving one adapter beside another that is
    called "router" would leave all routers out of its file.

    Raises:
        ValueError: naming the part.
    """
    parts = {part for name in candidates(model) for part in name.split(".") if ".modules_to_save" not in name}
    if adapter_name in parts | OUR_NAMES:
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a module or parameter, by which PEFT would confuse "
            "adapters when it saves them; choose another name."
        )


def check_not_partitioned(state_dict: Mapping[str, Tensor]) -> None:
    """Warns if weights to be saved are empty, as they are under ZeRO-3 when nobody gathered them."""
    empty = [name for name, tensor in state_dict.items() if _OURS in name and tensor.numel() == 0]
    if empty:
        warnings.warn(
            f"{len(empty)} adapter weights to be saved are empty, e.g. {empty[0]}: under ZeRO-3 they are partitioned. "
            "Save through the Trainer, pass state_dict=engine._zero3_consolidated_16bit_state_dict(), or gather them "
            "with deepspeed.zero.GatheredParameters first.",
            stacklevel=2,
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuses to save weights that are not finite.

    Raises:
        ValueError: naming the first tensor with NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite (NaN or infinity): such an adapter is not saved.")


def check_complete(
    loaded: Mapping[str, Tensor], model_state: Mapping[str, Tensor], layers: set[str], adapter_name: str
) -> None:
    """Refuses an adapter file that lacks weights of this adapter, or has some that fit nowhere.

    Args:
        loaded: the file's tensors under the model's names. model_state: the model's state dict.
        layers: names of the adapted layers. adapter_name: the adapter that is being loaded.

    Raises:
        ValueError: naming the keys.
    """
    name = re.escape(adapter_name)
    mine = re.compile(rf"(.*)\.(?:moelora_experts\.{name}\.|lora_[AB]\.{name}\.weight$)")
    expected = {key for key in model_state if (m := mine.match(key)) and m.group(1) in layers}
    missing = sorted(expected - loaded.keys())
    unexpected = sorted(key for key in loaded if _OURS in key and key not in expected)
    if missing or unexpected:
        raise ValueError(
            f"The adapter's weights do not fit the model as configured. {_some('Missing', missing)}"
            f"{_some('Unexpected', unexpected)}The file may be truncated, or saved with another configuration or for "
            "another base model."
        )


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    return f"{what} ({len(keys)}): {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}. "
