"""Whole tensors and shards: an adapter's file has all experts, whatever topology wrote it or will load it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from ...checkpoint.processes import agree
from ..experts import MoELoRAExperts


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


def cut_for_loading(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Whole tensors, under the model's names, replaced by the entries of this rank's experts."""
    cut = dict(state_dict)
    for name, module in sharded_experts(model, adapter_name).items():
        module.cut_whole_tensors(cut, f"{name}.")
    return cut


def first_rank_writes(save: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.save_pretrained`, called on every rank, that writes on rank 0 alone if experts are sharded.

    All ranks leave the call when the files are there, or raise if rank 0 could not write.
    """

    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        if not sharded_experts(self) or kwargs.get("state_dict") is not None:
            save(self, save_directory, *args, **kwargs)
            return
        whole = {key: tensor for name in self.peft_config for key, tensor in gather_experts(self, name).items()}
        failure: Exception | None = None
        if kwargs.get("is_main_process", True) and dist.get_rank() == 0:
            try:
                save(self, save_directory, *args, **{**kwargs, "state_dict": {**self.state_dict(), **whole}})
            except Exception as error:
                failure = error
        agree(failure, "The adapter was not saved", ValueError)

    return save_pretrained
