"""A saved adapter, checked and read without its base model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..config import PEFT_TYPE, PEFT_TYPES, MoELoRAConfig
from ..patterns import layer_config

MODEL_PREFIX = "base_model.model."
_OURS = re.compile(rf"{re.escape(MODEL_PREFIX)}(.+)\.moelora_experts\.(.+)")
_ROUTER = "router.weight"
MOST_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class SavedLayer:
    """One layer of a saved adapter; E experts of rank r between I inputs and O outputs.

    Args:
        name: of the module in the base model.
        config: what holds for this layer (`patterns.layer_config`). scaling: s.
        lora_A: (E, I, r), or (1, I, r) with `shared_A`. lora_B: (E, O, r). router: (E, I).
        shared: lora_A (1, I, r) and lora_B (1, O, r) of the shared expert, if there is one.
        start: lora_A (E, I, r) and lora_B (E, O, r) of a start from singular values, if it had one.
    """

    name: str
    config: MoELoRAConfig
    scaling: float
    lora_A: Tensor
    lora_B: Tensor
    router: Tensor
    shared: tuple[Tensor, Tensor] | None
    start: tuple[Tensor, Tensor] | None

    def expert(self, number: int) -> tuple[Tensor, Tensor]:
        """A (I, r) and B (O, r) of one expert."""
        return self.lora_A[number if len(self.lora_A) > 1 else 0], self.lora_B[number]


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter.

    Args:
        config: as saved. layers: in the file's order.
        others: the file's other entries, modules that were saved whole, by their names in the file.
        num_bytes: of the file.
    """

    config: MoELoRAConfig
    layers: list[SavedLayer]
    others: dict[str, Tensor]
    num_bytes: int


def saved_fields(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter's adapter_config.json holds; of any type of adapter.

    Raises:
        ValueError: naming the file: it is not there, too large, or not a JSON object.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} is no saved adapter: it has no {CONFIG_NAME}. Name the folder that save_pretrained wrote, or "
            "--output_dir of a finished run."
        )
    try:
        size = path.stat().st_size
        if size > MOST_CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes, and a configuration at most {MOST_CONFIG_BYTES}")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is not a JSON object")
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return values


def read_config(folder: str | os.PathLike[str]) -> MoELoRAConfig:
    """The configuration of a saved adapter; anybody may have written the file.

    Raises:
        ValueError: as `saved_fields`; or the file is of another type of adapter, or out of bounds.
    """
    values = saved_fields(folder)
    try:
        kind = values.get("peft_type")
        if kind not in PEFT_TYPES:
            raise ValueError(f"peft_type {kind!r:.80} is another type of adapter; {PEFT_TYPE} is needed here")
        return MoELoRAConfig.from_peft_type(**MoELoRAConfig.check_kwargs(**values))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{Path(folder) / CONFIG_NAME} cannot be used: {error}") from error


def check_weights_file(path: str | os.PathLike[str]) -> None:
    """Reads the header of a safetensors file, which says whether the file is whole.

    Raises:
        ValueError: naming the file: it is not there, cut short, or no safetensors file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there; the adapter's folder is not complete.")
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); copy it again, or save the adapter anew."
        ) from error


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Reads adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: no such files, not a mixture of LoRA experts, or a layer that is incomplete.
    """
    config, weights = read_config(folder), Path(folder) / SAFETENSORS_WEIGHTS_NAME
    check_weights_file(weights)
    tensors = load_file(weights)
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        match = _OURS.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            parts.setdefault(match.group(1), {})[match.group(2)] = tensor
    if not parts:
        raise ValueError(f"{weights} has no experts; it has: {', '.join(list(tensors)[:3]) or 'nothing'}.")
    layers = [_read_layer(name, entries, config) for name, entries in parts.items()]
    return SavedAdapter(config, layers, others, weights.stat().st_size)


def _read_layer(name: str, entries: dict[str, Tensor], adapter: MoELoRAConfig) -> SavedLayer:
    config = layer_config(adapter, name)
    E, r, num_A = config.num_experts, config.r, 1 if config.shared_A else config.num_experts
    I, O = (
        entries[part].shape[1] if part in entries and entries[part].dim() == 3 else 0 for part in ("lora_A", "lora_B")
    )
    shapes = {"lora_A": (num_A, I, r), "lora_B": (E, O, r), _ROUTER: (E, I)}
    if config.shared_expert:
        shapes |= {"shared.lora_A": (1, I, r), "shared.lora_B": (1, O, r)}
    if config.from_svd:
        shapes |= {"initial_A": (E, I, r), "initial_B": (E, O, r)}
    if missing := [part for part in shapes if part not in entries]:
        raise ValueError(f"{name} lacks {', '.join(missing)}: the file may be truncated, or of another configuration.")
    for part, shape in shapes.items():
        tensor = entries[part]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or 0 in shape:
            raise ValueError(
                f"{name}: {part} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} in the file, and "
                f"{shape} by the configuration (num_experts={E}, r={r})."
            )
    return SavedLayer(
        name=name,
        config=config,
        scaling=config.scaling_of(entries["lora_A"].shape[1]),
        lora_A=entries["lora_A"],
        lora_B=entries["lora_B"],
        router=entries[_ROUTER],
        shared=(entries["shared.lora_A"], entries["shared.lora_B"]) if config.shared_expert else None,
        start=(entries["initial_A"], entries["initial_B"]) if config.from_svd else None,
    )
