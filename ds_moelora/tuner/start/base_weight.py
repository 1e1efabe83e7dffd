"""The base weight under an adapter: its sizes, its values in every storage format, and a hash that identifies it."""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITSANDBYTES = ("Params4bit", "Int8Params")
HASH_SHAPE = (2, 32)


def in_out_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a module that can be adapted, else None.

    Taken from the module's attributes: under ZeRO-3 a weight's shape is (0,) and its real one in `ds_shape`.
    """
    if isinstance(module, Conv1D):
        shape = getattr(module.weight, "ds_shape", module.weight.shape)
        return getattr(module, "nx", shape[0]), getattr(module, "nf", shape[1])
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        try:  # some models have tensors of one integer there
            sizes = [operator.index(getattr(module, name, None)) for name in names]  # type: ignore[arg-type]
        except TypeError:
            continue
        if min(sizes) > 0:
            return sizes[0], sizes[1]
    return None


def can_change(base: nn.Module) -> bool:
    """Whether the weight is a plain matrix, from which something can be subtracted."""
    weight: Any = getattr(base, "weight", None)
    return isinstance(base, (nn.Linear, Conv1D)) and type(weight) is nn.Parameter and weight.dtype in FLOATS


def can_read(base: nn.Module) -> bool:
    """Whether `read_weight` knows the form in which the weight is stored."""
    quantised = type(getattr(base, "weight", None)).__name__ in _BITSANDBYTES
    return can_change(base) or quantised or callable(getattr(base, "dequantize", None))


def read_weight(base: nn.Module) -> Tensor:
    """W0 (out, in) in a floating dtype: a plain weight itself, or bitsandbytes' 4 and 8 bit dequantised, or what the
    module's `dequantize()` returns.

    A partitioned weight must have been gathered.

    Raises:
        ValueError: bitsandbytes has repacked the weight.
    """
    if can_change(base):
        weight: Any = base.weight
        return weight.data.T if isinstance(base, Conv1D) else weight.data
    if type(getattr(base, "weight", None)).__name__ in _BITSANDBYTES:
        # The first inference on CPUs with AVX512-BF16 repacks it; dequantize_4bit then returns wrong values, no error.
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has repacked this 4-bit weight, and rounded its scales, for inference on the CPU; put "
                "the adapter on the model before its first forward pass in eval mode."
            )
        return dequantize_module_weight(base).data
    dequantize: Any = base.dequantize
    return dequantize().data


def weight_hash(weight: Tensor) -> Tensor:
    """SHA-256 of the values as they are, and of the values rounded to bfloat16; (2, 32) uint8 on the CPU."""
    return torch.stack([_sha256(weight), _sha256(weight.to(torch.bfloat16))])


def _sha256(values: Tensor) -> Tensor:
    content: Any = values.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)


def same_weight(saved: Tensor, found: Tensor) -> bool:
    """Whether two hashes are of the same weight. Where either is bfloat16, the comparison is in bfloat16."""
    saved, found = saved.cpu(), found.cpu()
    in_bfloat16 = any(torch.equal(h[0], h[1]) for h in (saved, found))
    return torch.equal(saved[1], found[1]) if in_bfloat16 else torch.equal(saved, found)


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter that several modules have in common, by its id."""
    names = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[id(param)].append(name)
    return {key: found for key, found in names.items() if len(found) > 1}
