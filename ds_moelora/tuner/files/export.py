"""A mixture as plain PEFT LoRAs, which other programs read: one per expert, and the router beside them.

    y = W0 x + s sum_i g_i(x) B_i A_i x + s B A x - (s / E) sum_j B0_j A0_j x
             = sum_i g_i(x) expert_i(x)  + always(x)

The second line's last two terms, the shared expert and what the base weight gave away to a start from singular values,
belong to every token: they are one more LoRA, `always`. With one expert its gate is 1, and everything is one LoRA.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_finite
from .adapter_file import MODEL_PREFIX, SavedAdapter, SavedLayer, read_adapter

DESCRIPTION, ROUTER_FILE, ALWAYS = "mixture.json", "router.safetensors", "always"
FORMULA = "y = base(x) + sum_i g_i(x) expert_i(x) + always(x)"
GATES = "z = router x / temperature; the top_k largest z are chosen; g = softmax(z) over the chosen, else 0; in float32"
TOP_P = "; of the top_k only the fewest, from the largest down, whose softmax over all experts adds up to top_p"
Factors = tuple[Tensor, Tensor]  # A (I, R), B (O, R)


def export_adapter(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[str]:
    """Writes a saved adapter as plain PEFT LoRAs for the unchanged base model.

    With several experts: `expert_0`, `expert_1`, ... and, if the mixture has such parts, `always` (one PEFT folder
    each), `router.safetensors` ((E, I) per layer) and `mixture.json`, which says how they make up the mixture. With one
    expert in every layer: one PEFT folder, `output` itself. The folder appears when it is complete.

    Args:
        folder: as `PeftModel.save_pretrained` wrote it. output: must not exist, or be empty.

    Returns:
        the PEFT folders, relative to `output`; "." for `output` itself.

    Raises:
        ValueError: the adapter cannot be read, has LoRA on stacked experts or weights that are not finite, or `output`
            has something in it.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; name another folder, or remove it.")
    adapter = read_adapter(folder)
    if adapter.config.target_parameters:
        raise ValueError(
            f"{folder} adapts stacked experts, too (target_parameters={adapter.config.target_parameters}), which no "
            "folder of single experts could hold. Train them in an adapter of their own: PEFT's LoraConfig."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's own is for the owner alone
        parts = _write(adapter, temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parts


def _write(adapter: SavedAdapter, folder: Path) -> list[str]:
    num_experts = max(layer.config.num_experts for layer in adapter.layers)
    if num_experts == 1:
        _write_lora(adapter, folder, lambda layer: _joined([layer.expert(0), *_always(layer)]))
        return ["."]
    names = [f"expert_{i}" for i in range(num_experts)]
    for i, name in enumerate(names):
        _write_lora(adapter, folder / name, lambda layer, i=i: _expert(layer, i))  # type: ignore[misc]
    has_always = any(_always(layer) for layer in adapter.layers)
    if has_always:
        _write_lora(adapter, folder / ALWAYS, lambda layer: _joined(_always(layer)))
    save_file({f"{layer.name}.weight": layer.router.contiguous() for layer in adapter.layers}, folder / ROUTER_FILE)
    config = adapter.config
    description = {
        "formula": FORMULA if has_always else FORMULA.removesuffix(" + always(x)"),
        "gates": GATES if config.top_p is None else GATES + TOP_P,
        "temperature": config.router_temperature,
        "top_p": config.top_p,
        "experts": names,
        "always": ALWAYS if has_always else None,
        "router": ROUTER_FILE,
        "base_model_name_or_path": config.base_model_name_or_path,
        "layers": {
            layer.name: {"num_experts": layer.config.num_experts, "top_k": layer.config.top_k}
            for layer in adapter.layers
        },
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return [*names, *([ALWAYS] if has_always else [])]


def _expert(layer: SavedLayer, number: int) -> Factors:
    """One expert's factors; zeros where the layer has fewer experts, and no router chooses this one."""
    if number < layer.config.num_experts:
        return layer.expert(number)
    A, B = layer.expert(0)
    return torch.zeros_like(A), torch.zeros_like(B)


def _always(layer: SavedLayer) -> list[Factors]:
    """What every token gets, times 1 / s: the shared expert, and minus the mean of the start's products."""
    found = []
    if layer.shared is not None:
        found.append((layer.shared[0][0], layer.shared[1][0]))
    if layer.start is not None:
        A, B = (factor.permute(1, 0, 2).flatten(1) for factor in layer.start)
        found.append((A, B / -layer.config.num_experts))
    return found


def _joined(parts: list[Factors]) -> Factors:
    """One pair whose product is the sum of the parts' products."""
    return torch.cat([A for A, _ in parts], 1), torch.cat([B for _, B in parts], 1)


def _write_lora(adapter: SavedAdapter, folder: Path, factors_of: Callable[[SavedLayer], Factors]) -> None:
    """One PEFT LoRA: delta W = (lora_alpha / r) B A, with one r and one lora_alpha for all layers.

    Where layers differ in rank or s, A and B are filled up with zero columns and B takes in s: not every program that
    serves LoRAs reads PEFT's `rank_pattern` and `alpha_pattern`.
    """
    factors = {layer.name: factors_of(layer) for layer in adapter.layers}
    scalings = {layer.name: layer.scaling for layer in adapter.layers}
    rank = max(A.shape[1] for A, _ in factors.values())
    alike = len(set(scalings.values())) == 1 and all(A.shape[1] == rank for A, _ in factors.values())
    tensors = dict(adapter.others)
    for name, (A, B) in factors.items():
        if not alike:
            B = (B.to(torch.promote_types(B.dtype, torch.float32)) * scalings[name]).to(B.dtype)
            A, B = (torch.nn.functional.pad(factor, (0, rank - factor.shape[1])) for factor in (A, B))
        tensors[f"{MODEL_PREFIX}{name}.lora_A.weight"] = A.T.contiguous()
        tensors[f"{MODEL_PREFIX}{name}.lora_B.weight"] = B.contiguous()
    check_finite(tensors)
    alpha = rank * next(iter(scalings.values())) if alike else rank
    folder.mkdir(exist_ok=True)
    _lora_config(adapter, rank, alpha).save_pretrained(str(folder), auto_mapping_dict=adapter.config.auto_mapping)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _lora_config(adapter: SavedAdapter, rank: int, alpha: float) -> LoraConfig:
    config = adapter.config
    kept: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "task_type",
            "base_model_name_or_path",
            "revision",
            "target_modules",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
            "layers_pattern",
        )
    }
    whole = int(alpha) if float(alpha).is_integer() else alpha
    lora = LoraConfig(r=rank, lora_alpha=whole, lora_dropout=0.0, bias="none", inference_mode=True, **kept)
    for name in ("target_modules", "exclude_modules"):  # PEFT's sets have another order in every process
        if isinstance(getattr(lora, name), set):
            setattr(lora, name, sorted(getattr(lora, name)))
    return lora
