"""What the planner knows of a model: the shapes of its linear modules, which of them are adapted, and a few totals."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tuner import MoELoRAConfig, MoELoRAModel
from ..tuner.layer import MoELoRALayer
from ..tuner.start.base_weight import in_out_features

# The name of a repeated block, at the beginning of those of its modules: up to the first number.
BLOCK = re.compile(r".*?\.\d+\.")


@dataclass(frozen=True)
class Linear:
    """A linear module of the base model."""

    name: str
    in_features: int
    out_features: int
    adapted: bool

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A base model and its adapted modules.

    Args:
        name: for messages.
        hidden_size: H. num_blocks: repeated blocks. vocab_size: V; 0 without a language-model head.
        attention_width: heads times head size, for the FLOPs of attention.
        base_parameters: elements of the base model. largest_parameter: of its largest tensor.
        linears: all linear modules, adapted or not.
    """

    name: str
    hidden_size: int
    num_blocks: int
    vocab_size: int
    attention_width: int
    base_parameters: int
    largest_parameter: int
    linears: tuple[Linear, ...]

    @cached_property
    def adapted_shapes(self) -> dict[tuple[int, int], int]:
        """(I, O) -> number of adapted modules of that shape."""
        return dict(Counter((m.in_features, m.out_features) for m in self.linears if m.adapted))

    @cached_property
    def num_adapted(self) -> int:
        return sum(self.adapted_shapes.values())

    @cached_property
    def adapted_in(self) -> int:
        """Sum of I over the adapted modules: a router has E I elements."""
        return sum(count * shape[0] for shape, count in self.adapted_shapes.items())

    @cached_property
    def adapted_width(self) -> int:
        """Sum of I + O over the adapted modules: its experts have E r (I + O) elements."""
        return sum(count * sum(shape) for shape, count in self.adapted_shapes.items())

    @cached_property
    def widest(self) -> int:
        """The largest I + O of an adapted module."""
        return max(map(sum, self.adapted_shapes))

    @cached_property
    def linear_numel(self) -> int:
        """Weights that every token is multiplied with."""
        return sum(m.numel for m in self.linears)

    @cached_property
    def block_width(self) -> float:
        """Sum of I + O over the linear modules of one block, the mean over blocks."""
        inside = [m for m in self.linears if BLOCK.match(m.name)] or self.linears
        return sum(m.in_features + m.out_features for m in inside) / self.num_blocks

    @cached_property
    def adapted_per_block(self) -> float:
        return self.num_adapted / self.num_blocks


def describe_model(config: str | Path | Any, target_modules: str | Sequence[str] = "all-linear") -> ModelShape:
    """Builds the model on the meta device (shapes without weights), adapts it as `get_peft_model` does, and measures.

    Args:
        config: a transformers config, a `config.json`, or the folder that holds one.
        target_modules: as in `MoELoRAConfig`.

    Raises:
        ValueError: no readable config, no model for it, or target modules that match nothing or cannot be adapted.
    """
    name = str(config) if isinstance(config, str | Path) else type(config).__name__
    config = _read_config(config) if isinstance(config, str | Path) else config
    model = _build(config, name)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, hidden = getattr(text, "num_attention_heads", 1), getattr(text, "hidden_size", 0)
    if not hidden:
        raise ValueError(f"{name}: the config says nothing of hidden_size, which the planner needs.")
    sizes = [p.numel() for p in model.parameters()]
    found = {n: shape for n, m in model.named_modules() if n and (shape := in_out_features(m)) is not None}
    adapted = _adapted_names(model, target_modules)
    return ModelShape(
        name=name,
        hidden_size=hidden,
        num_blocks=len({block.group() for n in found if (block := BLOCK.match(n))}) or 1,
        vocab_size=text.vocab_size if model.get_output_embeddings() is not None else 0,
        attention_width=heads * (getattr(text, "head_dim", None) or hidden // heads),
        base_parameters=sum(sizes),
        largest_parameter=max(sizes),
        linears=tuple(Linear(n, *shape, n in adapted) for n, shape in found.items()),
    )


def _read_config(path: str | Path) -> Any:
    from transformers import AutoConfig

    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is not there; pass a model's config.json, or the folder that holds it.")
    try:
        values = json.loads(file.read_text())
        return AutoConfig.for_model(**values)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not the config of a transformers model: {' '.join(str(error).split())}") from error


def _build(config: Any, name: str) -> Any:
    import transformers

    classes = [getattr(transformers, n, None) for n in getattr(config, "architectures", None) or []]
    auto = (transformers.AutoModelForCausalLM, transformers.AutoModel)
    error: Exception | None = None
    with torch.device("meta"):
        for known in filter(None, classes):
            return known(config)
        for known in auto:
            try:
                return known.from_config(config)
            except ValueError as e:
                error = e
    raise ValueError(f"{name}: transformers has no model for this config: {error}")


def _adapted_names(model: nn.Module, target_modules: str | Sequence[str]) -> set[str]:
    """Names of the modules that the tuner itself replaces, found with the smallest possible experts."""
    targets: Any = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = MoELoRAConfig(r=1, num_experts=1, top_k=1, target_modules=targets)
    tuner = MoELoRAModel(model, {"default": config}, "default")
    return {n.removeprefix("model.") for n, m in tuner.named_modules() if isinstance(m, MoELoRALayer)}
