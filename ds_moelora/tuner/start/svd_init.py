"""Starting factors from the base weights' singular values: computed for a new adapter, loaded with a saved one.

The layers are dealt out to the N processes, N layers a round. Phases of a round:

    1. every layer's weight in turn is gathered (ZeRO-3 only) and copied by the process that owns the layer
    2. every process decomposes its layer; one all-gather of error messages
    3. every layer's triplets are broadcast by their owner, 4 E r (in + out) bytes in fp32; the weight is gathered again
       and changed

so that no process ever holds more than one whole weight beside its own share of the model.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.utils import logging

from ...checkpoint.processes import agree, broadcast, gathered, rank, world_size
from ...mixture.goat import check_rank, starting_factors, triplet_indices
from ...mixture.svd import Triplets, singular_triplets
from ..config import MoELoRAConfig
from ..patterns import layer_config
from .base_weight import HASH_SHAPE, can_change, can_read, in_out_features, same_weight, shared_weights
from .residual import fold, original_hash, original_weight, unfold
from .svd_cache import cached_triplets

_loading = contextvars.ContextVar("ds_moelora_loading", default=False)


def check_svd_targets(config: MoELoRAConfig, model: nn.Module, matches: Callable[[Any, str], Any]) -> None:
    """Refuses targets whose singular values cannot be had, before the first module is replaced.

    Args:
        config: with names in `target_modules`. model: the base model. matches: PEFT's rule, (config, name) -> bool.

    Raises:
        ValueError: r is too large for a weight, a weight belongs to other modules too, or it is stored in a form that
            cannot be read.
    """
    shared = shared_weights(model)
    for name, module in model.named_modules():
        if not name or not matches(config, name):
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        features = in_out_features(base)
        if features is None:
            continue
        mine = layer_config(config, name)
        check_rank(*features, mine.num_experts, mine.r, name)
        if not can_read(base):
            raise ValueError(
                f"{name} ({type(base).__name__}) stores its weight in a form that init_lora_weights="
                f"{config.init_lora_weights!r} cannot read; it takes float weights, bitsandbytes' 4 and 8 bit, and "
                "modules with a dequantize() method. Use init_lora_weights=True, or exclude_modules."
            )
        tied = shared.get(id(getattr(base, "weight", None)), [])
        others = [other for other in tied if other != f"{name}.weight"]
        if others and can_change(base):
            raise ValueError(
                f"{name}.weight is the same parameter as {others[0]}: init_lora_weights={config.init_lora_weights!r} "
                "changes the weights that it starts from, and so that module's. Leave one out "
                "(exclude_modules), untie them (tie_word_embeddings=False), or use init_lora_weights=True."
            )


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers in which an adapter starts from singular values, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and adapter_name in getattr(module, "moelora_experts", ())
        and module.experts(adapter_name).residual is not None
    }


def _on_meta(layer: Any) -> bool:
    return any(p.is_meta for p in layer.get_base_layer().parameters(recurse=False))


def start_from_singular_values(model: nn.Module, adapter_name: str, config: MoELoRAConfig) -> None:
    """Gives every layer of a new adapter its starting factors, and takes their mean from the base weight.

    Nothing is computed while a saved adapter is being loaded, which brings its factors, nor where base or adapter is on
    the meta device.

    Raises:
        ValueError: on every rank, if a decomposition fails on one.
    """
    layers = adapted_layers(model, adapter_name)
    empty = any(_on_meta(layer) or layer.experts(adapter_name).factors()[0].is_meta for layer in layers.values())
    if empty or _loading.get() or config.weights_follow:
        return
    process, size, names = rank(), world_size(), list(layers)
    bar = logging.tqdm(total=len(names), desc="Singular values of the base weights", disable=process != 0, delay=1)
    for start in range(0, len(names), size):
        batch = names[start : start + size]
        found = _decompose_own([(name, layers[name]) for name in batch], adapter_name, config)
        for owner, name in enumerate(batch):
            _start_layer(layers[name], adapter_name, config, found if owner == process else None, owner)
            bar.update()
    bar.close()


def _decompose_own(batch: list[tuple[str, Any]], adapter_name: str, config: MoELoRAConfig) -> list[Tensor] | None:
    """[U, S, V, hash] of this process's layer of the round; None if there is none for it."""
    process = rank()
    name, own = batch[process] if process < len(batch) else ("", None)
    weight = base_hash = found = error = None
    for _, layer in batch:
        # All processes gather: an error may neither end this loop early, nor go unreported to the others.
        with gathered(layer.get_base_layer().parameters(recurse=False)):
            if layer is own:
                try:
                    weight, base_hash = original_weight(layer)
                    weight = weight.clone()
                except Exception as e:
                    error = ValueError(f"{name}: {e}")
    if own is not None and weight is not None and base_hash is not None:
        experts = own.experts(adapter_name)
        variant = str(config.init_lora_weights)
        indices = triplet_indices(min(weight.shape), experts.num_experts, experts.rank, variant).flatten()
        decompose = functools.partial(singular_triplets, weight, indices)
        try:
            found = [*cached_triplets(config.svd_cache_dir, base_hash, indices, decompose), base_hash]
        except Exception as e:
            error = ValueError(f"{name}: {e}")
    agree(error, "A start from singular values failed", ValueError)
    return found


@torch.no_grad()
def _start_layer(layer: Any, adapter_name: str, config: MoELoRAConfig, found: list[Tensor] | None, owner: int) -> None:
    """Broadcasts one layer's triplets, writes its factors, and folds their mean into the base weight."""
    experts = layer.experts(adapter_name)
    lora_A, lora_B = experts.factors()
    K = experts.num_experts * experts.rank
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    shapes = ((layer.out_features, K), (K,), (layer.in_features, K))
    # Not torch.zeros, whose dtype and device deepspeed.zero.Init changes.
    tensors = [lora_A.new_zeros(shape, dtype=dtype) for shape in shapes]
    tensors.append(lora_A.new_zeros(HASH_SHAPE, dtype=torch.uint8))
    if found is not None:
        for tensor, value in zip(tensors, found, strict=True):
            tensor.copy_(value)
    broadcast(tensors, owner)
    *triplets, base_hash = tensors
    A, B = starting_factors(Triplets(*triplets), experts.num_experts, experts.scaling, config.rho)
    A, B = A.to(lora_A.dtype), B.to(lora_B.dtype)
    with gathered([lora_A, lora_B], modify=True):
        lora_A.copy_(A[experts.local_experts()])
        lora_B.copy_(B[experts.local_experts()])
    for target, value in zip(experts.initial_factors(), (A, B), strict=True):
        target.copy_(value[experts.local_experts()])
    experts.base_hash.copy_(base_hash)
    assert experts.residual is not None
    experts.residual.ready = True
    fold(layer, adapter_name, A, B)


def check_base_weights(model: nn.Module, adapter_name: str, entries: Mapping[str, Tensor]) -> None:
    """Compares the hashes in an adapter's file with the base weights that it is being loaded onto.

    Args:
        entries: the file's tensors under the model's names.

    Raises:
        ValueError: naming the first layer whose weight is another.
    """
    for name, layer in adapted_layers(model, adapter_name).items():
        saved = entries.get(f"{name}.moelora_experts.{adapter_name}.base_hash")
        if saved is not None and not _on_meta(layer) and not same_weight(saved, original_hash(layer)):
            raise ValueError(
                f"{name}: the base weight is not the one that this adapter was trained on, whose singular values it "
                "started from. Load the adapter onto the original base model, in the dtype of training or in bfloat16."
            )


def take_over_start(model: nn.Module, adapter_name: str, entries: Mapping[str, Tensor]) -> None:
    """Makes the base weights fit the starting factors (of all experts) that are about to be loaded.

    Raises:
        ValueError: other starting factors are in place and cannot be taken back (`ep_size > 1`).
    """
    for name, layer in adapted_layers(model, adapter_name).items():
        experts, prefix = layer.experts(adapter_name), f"{name}.moelora_experts.{adapter_name}."
        residual, present = experts.residual, experts.initial_factors()
        coming = [
            entries[prefix + role].to(p.device if not p.is_meta else "cpu", p.dtype)
            for role, p in zip(("initial_A", "initial_B"), present, strict=True)
        ]
        assert residual is not None
        own = experts.local_experts()
        if residual.folded and all(torch.equal(p, c[own]) for p, c in zip(present, coming, strict=True)):
            continue
        unfold(layer, adapter_name)
        residual.ready = True
        if not _on_meta(layer):
            fold(layer, adapter_name, coming[0], coming[1])


@contextmanager
def factors_come_from_a_file() -> Iterator[None]:
    """Inside, new adapters are made to load saved weights into them: nothing is decomposed."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)
