"""Checks before a model is changed, saved or loaded: what PEFT would let pass in silence, or stop at halfway."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from .config import MoELoRAConfig
from .layer import MoELoRALayer
from .start.base_weight import in_out_features

_OURS = ".moelora_experts."
# Their fused kernels read the weights of these modules and never call them.
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_UNCALLED = {"out_proj", "conv1d"}


OUR_NAMES = {"router", "lora_A", "lora_B", "weight", "bias", "base_layer", "moelora_experts"}
OUR_NAMES |= {"shared", "shard", "deepspeed_moe", "experts", "deepspeed_experts"}


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may be targets: not the root, and nothing inside an adapted layer."""
    modules = {name: module for name, module in model.named_modules() if name}
    inside = tuple(name + "." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in modules.items() if not name.startswith(inside or ("\0",))}


def _matches(entry: str, names: Iterable[str]) -> bool:
    return any(name == entry or name.endswith("." + entry) for name in names)


def without_absent(target_modules: Any, model: nn.Module) -> Any:
    """PEFT's default targets for an architecture, without the names that this model does not have."""
    if isinstance(target_modules, str):
        return target_modules
    names = list(_candidates(model))
    return {entry for entry in target_modules if _matches(entry, names)} or target_modules


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuses an adapter name that is also a part of a parameter's name.

    PEFT tells adapters apart by looking for ".name." anywhere in a key: saving one adapter beside another that is
    called "router" would leave all routers out of its file.

    Raises:
        ValueError: naming the part.
    """
    parts = {part for name in _candidates(model) for part in name.split(".") if ".modules_to_save" not in name}
    if adapter_name in parts | OUR_NAMES:
        raise ValueError(
            f"adapter_name={adapter_name!r} is also the name of a module or parameter, by which PEFT would confuse "
            "adapters when it saves them; choose another name."
        )


def check_targets(config: MoELoRAConfig, model: nn.Module, matches: Callable[[Any, str], Any]) -> None:
    """Refuses target modules that are not there or cannot be adapted, before the first module is replaced.

    PEFT itself raises only if nothing at all matches, so one misspelt name among several would train silently less.

    Args:
        config: with `target_modules` filled in. model: the base model.
        matches: PEFT's rule: (config, name) -> true if the module is a target.

    Raises:
        ValueError: an entry matches no module, or a target cannot be adapted; all of them are named.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return
    modules = _candidates(model)
    if targets is not None and not isinstance(targets, str):
        absent = sorted(entry for entry in targets if not _matches(entry, modules))
        if absent:
            endings = sorted({name.rpartition(".")[2] for name, m in modules.items() if _can_adapt(m)} - {""})
            near = {n for entry in absent for n in difflib.get_close_matches(entry.rpartition(".")[2], endings, n=1)}
            raise ValueError(
                f"target_modules: {absent} not found in the base model. "
                + (f"Did you mean {sorted(near)}? " if near else "")
                + f"Modules that can be adapted end in {[e for e in endings if not e.isdigit()][:30]}."
            )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bad = []
    for name, module in modules.items():
        if not matches(config, name):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            bad.append(f"{name} (nn.MultiheadAttention reads its weight and never calls it)")
        elif model_type in _MAMBA_TYPES and name.rpartition(".")[2] in _MAMBA_UNCALLED:
            bad.append(f"{name} (Mamba's kernels read its weight and never call it)")
        elif not _can_adapt(module):
            bad.append(f"{name} ({type(module).__name__})")
    if bad:
        raise ValueError(
            f"These target modules cannot be adapted: {', '.join(bad)}. MoE-LoRA adapts nn.Linear, Conv1D and modules "
            "with in_features and out_features; change target_modules, or name these in exclude_modules."
        )


def target_names(config: MoELoRAConfig, model: nn.Module, matches: Callable[[Any, str], Any]) -> list[str]:
    """Qualified names of the modules that a configuration adapts; arguments as in `check_targets`."""
    expanded = _maybe_include_all_linear_layers(copy.copy(config), model)
    return [name for name in _candidates(model) if matches(expanded, name)]


def _can_adapt(module: nn.Module) -> bool:
    return isinstance(module, MoELoRALayer) or in_out_features(module) is not None


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
    mine = re.compile(rf"(.*)\.moelora_experts\.{re.escape(adapter_name)}\.")
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
