"""The residual of the base weight under experts that start from it: W0 - (s / E) sum_i B_i A_i of the start.

Where the weight is a plain matrix and no other adapter of the layer has done so, it is *folded*: subtracted from the
weight once, so that a forward pass costs nothing more. Elsewhere (quantised weights, further adapters) the layer
subtracts it in every forward pass, from the starting factors: exact, and nothing has to be quantised again. The same
function, with the other sign, gives the base model back while a folded adapter is switched off.

The starting factors are buffers beside the trained ones (`initial_A`, `initial_B`), and are saved with them.

`layer` is a `MoELoRALayer` everywhere: this folder imports neither layers nor experts, which import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...checkpoint.processes import gathered
from ...mixture.goat import mean_product
from .base_weight import can_change, read_weight, weight_hash


@dataclass
class Residual:
    """Where the mean of one adapter's starting factors is.

    Args:
        ready: the starting factors are there (computed or loaded).
        folded: their mean is subtracted from the base weight.
    """

    ready: bool = False
    folded: bool = False


def check_ready(layer: Any, applied: list[str]) -> None:
    """Before adapters are applied.

    Raises:
        ValueError: an adapter has no starting factors, having been made on a model without weights.
    """
    for name in applied:
        experts = layer.moelora_experts[name]
        if experts.residual is not None and not experts.residual.ready:
            raise ValueError(
                f"{experts.pair.name}: adapter {name!r} starts from the base weight's singular values, but was put on "
                "a model without weights (meta device); load the model's weights before get_peft_model, or load a "
                "saved adapter into it."
            )


def correct(layer: Any, x: Tensor, y: Tensor, applied: list[str]) -> Tensor:
    """`y` with the residual of every adapter in `applied`, and of no other.

    Args:
        x: (..., in). y: (..., out), the output of the base layer and of the experts in `applied`.
    """
    for name, experts in layer.moelora_experts.items():
        residual, wanted = experts.residual, name in applied
        if residual is not None and name not in layer.merged_adapters and wanted != residual.folded:
            y = experts.add_mean(x, y, -1.0 if wanted else 1.0)
    return y


def fold(layer: Any, adapter: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Subtracts the mean of starting factors (all E experts') from the base weight, if that can be done.

    Every rank has to call it where the weight is partitioned.
    """
    residual = layer.experts(adapter).residual
    assert residual is not None
    if not residual.folded and folded_adapter(layer) is None and can_change(layer.get_base_layer()):
        _add_to_base(layer, mean_product(lora_A, lora_B, layer.experts(adapter).scaling), -1.0)
        residual.folded = True


def unfold(layer: Any, adapter: str) -> None:
    """Gives the base weight back what `fold` took: W0, up to one rounding of the weight.

    Raises:
        ValueError: the experts are spread over ranks.
    """
    experts = layer.experts(adapter)
    residual = experts.residual
    if residual is None or not residual.folded:
        return
    _add_to_base(layer, experts.mean_of_start(), 1.0)
    residual.folded = False


def folded_adapter(layer: Any) -> str | None:
    """The adapter whose starting mean is subtracted from the base weight; None if there is none."""
    for name in layer.moelora_experts:
        residual = layer.experts(name).residual
        if residual is not None and residual.folded:
            return name
    return None


def original_weight(layer: Any) -> tuple[Tensor, Tensor]:
    """W0 (out, in) and its hash. A partitioned weight must have been gathered.

    Raises:
        ValueError: W0 cannot be had, since its residual's factors are spread over ranks.
    """
    weight, folded = read_weight(layer.get_base_layer()), folded_adapter(layer)
    if folded is None:
        return weight, weight_hash(weight)
    experts = layer.experts(folded)
    return weight + experts.mean_of_start(), experts.base_hash


def original_hash(layer: Any) -> Tensor:
    """The hash of W0; every rank has to call it where the weight is partitioned."""
    for name in layer.moelora_experts:
        residual = layer.experts(name).residual
        if residual is not None and residual.ready:
            return layer.experts(name).base_hash
    base = layer.get_base_layer()
    with gathered(base.parameters(recurse=False)):
        return weight_hash(read_weight(base))


@torch.no_grad()
def _add_to_base(layer: Any, delta: Tensor, sign: float) -> None:
    """W += sign * delta, computed in the wider of both dtypes and float32, and rounded once."""
    base = layer.get_base_layer()
    with gathered([base.weight], modify=True):
        weight = base.weight.data
        wide = torch.promote_types(weight.dtype, delta.dtype)
        delta = delta.T if isinstance(base, Conv1D) else delta
        weight.copy_(weight.to(wide) + sign * delta.to(weight.device, wide))
