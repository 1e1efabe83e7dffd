"""Whole tensors and shards: an adapter's file has all experts, whatever topology wrote it or will load it."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ...checkpoint.processes import agree, together
from ..experts import MoELoRAExperts
from .tensor_file import append_tensors

# What is being saved leaves out sharded experts, which `append_experts` will add.
_experts_follow = contextvars.ContextVar("ds_moelora_experts_follow", default=False)


def sharded_experts(model: nn.Module, adapter_name: str | None = None) -> dict[str, MoELoRAExperts]:
    """The modules whose experts are spread over ranks, by name; of one adapter, or of all."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELoRAExperts) and module.is_sharded and adapter_name in (None, module.adapter_name)
    }


def gather_experts(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Every sharded factor of an adapter, whole, by its name without sharding. Every rank has to call it.

    One factor of one layer is gathered at a time, and only to rank 0, on its CPU.

    Returns:
        {"....moelora_experts.<adapter>.lora_A": (E, in, r), ...} on rank 0; {} on the other ranks.
    """
    found = {}
    for name, module in sharded_experts(model, adapter_name).items():
        for factor in module.factor_names():
            whole = module.experts_shard().gather(factor)
            if whole is not None:
                found[f"{name}.{factor}"] = whole
    return found


def with_whole_experts(
    model: nn.Module, selected: dict[str, Tensor], given: dict[str, Tensor], adapter_name: str
) -> dict[str, Tensor]:
    """An adapter's entries of a state dict, with whole tensors in the place of this rank's experts.

    Args:
        selected: the adapter's entries. given: the state dict that they were taken from.

    Raises:
        RuntimeError: the state dict was made elsewhere, so that the other ranks may not be here to give their experts.
    """
    modules = sharded_experts(model, adapter_name)
    if not modules:
        return selected
    kept = {key: value for key, value in selected.items() if not key.startswith(tuple(f"{n}.shard." for n in modules))}
    if _experts_follow.get():
        return kept
    whole_names = [f"{name}.{factor}" for name, module in modules.items() for factor in module.factor_names()]
    if all(name in kept for name in whole_names):
        return kept
    pointers = {p.data_ptr() for module in modules.values() for p in module.factors()}
    # The model's own state dict has views of its parameters; a copy comes from a Trainer, which saves on one rank.
    if not any(value.data_ptr() in pointers for value in given.values() if isinstance(value, Tensor)):
        raise RuntimeError(
            "The state dict to be saved has only this rank's experts (ep_size > 1). Call model.save_pretrained(path) "
            "on every rank; in a Trainer, gather them before it saves on one (docs/expert_parallelism.md shows how)."
        )
    return {**kept, **gather_experts(model, adapter_name)}


@contextmanager
def without_experts() -> Iterator[None]:
    """Inside, `PeftModel.save_pretrained` leaves out sharded experts; `append_experts` adds them to its file."""
    token = _experts_follow.set(True)
    try:
        yield
    finally:
        _experts_follow.reset(token)


def append_experts(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Adds an adapter's sharded experts to the file that was saved without them. Every rank has to call it.

    One factor of one layer at a time is gathered to rank 0 and written there: no more of them is in memory.

    Raises:
        ValueError: rank 0 could not write; raised on every rank.
    """
    modules = sharded_experts(model, adapter_name)
    factors = [
        (f"{name.removesuffix('.' + adapter_name)}.{factor}", module, factor)
        for name, module in modules.items()
        for factor in module.factor_names()
    ]
    gathered = (module.experts_shard().gather(factor) for _, module, factor in factors)
    failure: Exception | None = None
    if dist.get_rank() == 0:
        specs = {}
        for name, module, factor in factors:
            mine = getattr(module.experts_shard(), factor)
            specs[name] = (mine.dtype, (module.num_experts, *mine.shape[1:]))
        try:
            append_tensors(Path(folder) / SAFETENSORS_WEIGHTS_NAME, specs, (t for t in gathered if t is not None))
        except (OSError, ValueError) as error:
            failure = error
    for _ in gathered:  # every rank gives all its experts, whatever befell the writer
        pass
    agree(failure, "The adapter was not saved", ValueError)


def cut_for_loading(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Whole tensors, under the model's names, replaced by the entries of this rank's experts."""
    cut = dict(state_dict)
    for name, module in sharded_experts(model, adapter_name).items():
        module.cut_whole_tensors(cut, f"{name}.")
    return cut


def first_rank_writes(save: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.save_pretrained`, called on every rank, that writes on rank 0 alone if experts are sharded.

    The other ranks only give their experts, one factor at a time; their own dictionaries would be written as incomplete
    files over rank 0's. All ranks leave the call when the files are there, or raise if one failed.
    """

    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        if not sharded_experts(self) or kwargs.get("state_dict") is not None:
            save(self, save_directory, *args, **kwargs)
            return
        kwargs["is_main_process"] = kwargs.get("is_main_process", True) and dist.get_rank() == 0
        with together("The adapter was not saved", Exception, kind=ValueError), without_experts():
            if not kwargs.get("safe_serialization", True):
                raise ValueError("safe_serialization=False is not possible with ep_size > 1: save as safetensors.")
            save(self, save_directory, *args, **kwargs)
        for name in kwargs.get("selected_adapters") or list(self.peft_config):
            append_experts(self, Path(save_directory) / ("" if name == "default" else name), name)

    return save_pretrained
