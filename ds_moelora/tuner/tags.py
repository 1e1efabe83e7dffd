"""Telling an optimizer which parameters of a model are the pairs of a low-rank product."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..optimizer.guard import OURS
from ..optimizer.sharding.zero import configured_optimizer
from ..pairs import LoraPair, tag_pair
from .base_experts import check_auto_ep, check_layout, gate_of
from .layer import MoELoRALayer


def tag_lora_pairs(model: nn.Module) -> int:
    """Tags every MoE-LoRA pair and every plain PEFT LoRA pair of a model, trainable or not.

    Call it for an optimizer that you build yourself on PEFT's `LoraConfig`. One that DeepSpeed builds from its config
    needs no call (`tag_before_building`), and MoE-LoRA layers tag themselves. Convolutions are pairs as well:
    flattened, A is (r, in * kernel) and B (out, r). A layer of PEFT's `target_parameters` is E pairs, one per expert of
    the base (`tuner.base_experts`). Left alone: DoRA's magnitudes, biases, and, with a warning that names them,
    embeddings and other variants that are not one product of two matrices.

    Args:
        model: with or without PEFT's wrapper.

    Returns:
        The number of pairs; the experts of one stacked parameter count as one.

    Raises:
        ValueError: there is none, or this PEFT keeps the experts' factors in another layout.
    """
    num_pairs = tag_model(model)
    if not num_pairs:
        raise ValueError(
            f"{type(model).__name__} has no LoRA pair to tag. Call get_peft_model(model, MoELoRAConfig(...)), or "
            "get_peft_model(model, LoraConfig(...)), first, and pass the model that it returns."
        )
    return num_pairs


def tag_before_building(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DeepSpeedEngine._configure_basic_optimizer`, which tags the model for an optimizer of ours in the config."""

    def configure(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if configured_optimizer(engine) in OURS:
            check_auto_ep(engine)
            tag_model(engine.module)  # none: the optimizer says so, unless its pairs are tagged by somebody else
        return original(engine, *args, **kwargs)

    return configure


def tag_model(model: nn.Module) -> int:
    """`tag_lora_pairs` that may find none."""
    num_pairs, left_alone = 0, []
    for name, module in model.named_modules():
        if isinstance(module, MoELoRALayer):
            for adapter in module.moelora_experts:
                experts = module.experts(adapter)
                experts.tag(name)
                num_pairs += 1 if experts.shared is None else 2
        elif isinstance(module, LoraLayer):
            for adapter in module.r:
                if _tag_plain_lora(name, module, adapter):
                    num_pairs += 1
                else:
                    left_alone.append(f"{name} ({type(module).__name__}, adapter {adapter!r})")
    if left_alone:
        warnings.warn(
            f"tag_lora_pairs left {len(left_alone)} LoRA layers without a tag, since their weights are not one pair "
            f"(A, B) of matrices; they will be trained without a preconditioner: {', '.join(left_alone)}.",
            stacklevel=3,
        )
    return num_pairs


def _tag_plain_lora(name: str, layer: LoraLayer, adapter: str) -> bool:
    """Tags one adapter of one PEFT LoRA layer; False if it is not a pair (A: (r, ...), B: (out, r, 1...))."""
    if adapter not in layer.lora_A or adapter not in layer.lora_B:
        return False
    lora_A = getattr(layer.lora_A[adapter], "weight", None)
    lora_B = getattr(layer.lora_B[adapter], "weight", None)
    if not isinstance(lora_A, nn.Parameter) or not isinstance(lora_B, nn.Parameter):
        return False
    rank, shape_A, shape_B = layer.r[adapter], _whole_shape(lora_A), _whole_shape(lora_B)
    is_matrix_B = len(shape_B) >= 2 and all(size == 1 for size in shape_B[2:])
    experts, gate = 1, None
    if isinstance(layer, ParamWrapper):
        check_layout()
        experts, gate = layer.num_experts, gate_of(layer.get_base_layer())
    if not is_matrix_B or shape_A[0] != rank * experts or shape_B[1] != rank * experts:
        return False
    # The same object again where there is one: an optimizer may hold it.
    pair: Any = getattr(lora_A, "lora_pair", None)
    if not (isinstance(pair, LoraPair) and pair is getattr(lora_B, "lora_pair", None)):
        pair = LoraPair(name=name, num_experts=experts, rank=rank, rank_first_A=True)
    pair.name, pair.rank, pair.scaling, pair.gate = name, rank, float(layer.scaling[adapter]), gate
    tag_pair(pair, lora_A, lora_B)
    return True


def _whole_shape(param: Tensor) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))  # under ZeRO-3 shape is (0,)
