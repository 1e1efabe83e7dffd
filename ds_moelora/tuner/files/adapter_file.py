"""An adapter as it was saved, read without its base model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import PEFT_TYPE, MoELoRAConfig
from ..patterns import layer_config

MODEL_PREFIX = "base_model.model."
_OURS = re.compile(rf"{re.escape(MODEL_PREFIX)}(.+)\.moelora_experts\.(.+)")
_ROUTER = "router.weight"


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


def read_adapter(folder: str | os.PathLike[str]) -> SavedAdapter:
    """Reads adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: no such files, not a mixture of LoRA experts, or a layer that is incomplete.
    """
    path = Path(folder)
    weights = path / SAFETENSORS_WEIGHTS_NAME
    for file in (path / CONFIG_NAME, weights):
        if not file.is_file():
            raise ValueError(
                f"{folder} is no saved adapter: it has no {file.name}. Name the folder that save_pretrained wrote, or "
                "--output_dir of a finished run."
            )
    try:
        config = MoELoRAConfig.from_pretrained(str(path))
        tensors = load_file(weights)
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    if not isinstance(config, MoELoRAConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} has peft_type {kind}; this command reads {PEFT_TYPE} adapters.")
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
    needed = ["lora_A", "lora_B", _ROUTER]
    needed += ["shared.lora_A", "shared.lora_B"] if config.shared_expert else []
    needed += ["initial_A", "initial_B"] if config.from_svd else []
    missing = [part for part in needed if part not in entries]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}: the file may be truncated, or of another configuration.")
    expected = (config.num_experts, config.r)
    found = (len(entries["lora_B"]), entries["lora_B"].shape[-1])
    if found != expected:
        raise ValueError(f"{name} has (experts, rank) = {found} in its file and {expected} in its configuration.")
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
