"""What the planner knows of a model: the shapes of its linear modules, which of them are adapted, and a few totals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from torch import nn
from transformers import CONFIG_MAPPING, CONFIG_NAME, PreTrainedConfig, PreTrainedModel

from ..tuner import MoELoRAConfig, MoELoRAModel
from ..tuner.layer import MoELoRALayer
from ..tuner.start.base_weight import in_out_features

# The name of a repeated block, at the beginning of those of its modules: up to the first number.
BLOCK = re.compile(r".*?\.\d+\.")
# Where a config does not name its class: those that generate text first.
KINDS = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForTextToWaveform,
    transformers.AutoModel,
)
HUB_SECONDS = 5.0  # for the hub's first word
# Of a config that anybody may have written; every layer is built.
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Linear:
    """A linear module of the base model."""

    name: str
    in_features: int
    out_features: int
    adapted: bool


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A base model and its adapted modules.

    Args:
        name: for messages.
        hidden_size: H. num_blocks: repeated blocks. vocab_size: V; 0 without a language-model head.
        attention_width: heads times head size, for the FLOPs of attention.
        base_parameters: elements of the base model. largest_parameter: of its largest tensor.
        linears: all linear modules, adapted or not. targets: what chose the adapted ones, as in `MoELoRAConfig`.
    """

    name: str
    hidden_size: int
    num_blocks: int
    vocab_size: int
    attention_width: int
    base_parameters: int
    largest_parameter: int
    linears: tuple[Linear, ...]
    targets: str | Sequence[str] = "all-linear"

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
        return sum(m.in_features * m.out_features for m in self.linears)

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
    words, head = _embedding(model, "get_input_embeddings"), _embedding(model, "get_output_embeddings")
    text = _text_config(config)
    hidden = _size(text, "hidden_size") or (words.shape[1] if words is not None else 0)
    if not hidden:
        raise ValueError(f"{name}: the config says nothing of hidden_size, which the planner needs.")
    heads = _size(text, "num_attention_heads")
    head_size = _size(text, "head_dim") or hidden // (heads or 1)
    sizes = [p.numel() for p in model.parameters()]
    found = {n: shape for n, m in model.named_modules() if n and (shape := in_out_features(m)) is not None}
    if not found:
        raise ValueError(f"{name}: {type(model).__name__} has no linear module that could be adapted.")
    adapted = _adapted_names(model, target_modules, name)
    return ModelShape(
        name=name,
        hidden_size=hidden,
        num_blocks=len({block.group() for n in found if (block := BLOCK.match(n))}) or 1,
        vocab_size=head.shape[0] if head is not None else 0,
        # Some models give every layer its own number of heads, and no common one.
        attention_width=heads * head_size if heads else hidden,
        base_parameters=sum(sizes),
        largest_parameter=max(sizes),
        linears=tuple(Linear(n, *shape, n in adapted) for n, shape in found.items()),
        targets=target_modules,
    )


def _text_config(config: Any) -> Any:
    """The part of a config that describes the language model; all of it where it has no such part, or several."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _size(config: Any, name: str) -> int:
    """A positive integer of a config; 0 where it has none, several, or raises because layers differ."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers has a class of its own for it, which older versions lack
        return 0
    return value if isinstance(value, int) and value > 0 else 0


def _embedding(model: Any, getter: str) -> torch.Tensor | None:
    """The weight of the input or output embeddings; None where the model has none, or several."""
    try:
        weight = getattr(getattr(model, getter)(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _read_config(path: str | Path) -> Any:
    file = Path(path) / CONFIG_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        file = _from_hub(str(path))
    try:
        values, _ = PreTrainedConfig.get_config_dict(file)
        many = [key for key, n in values.items() if "layers" in key and isinstance(n, int) and n > MOST_LAYERS]
        if many:
            raise ValueError(f"{many[0]}={values[many[0]]} is more than {MOST_LAYERS}.")
        if values.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(f"transformers knows no model_type {values.get('model_type')!r}.")
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # what the file holds decides which kind
        raise ValueError(f"{file} is not the config of a transformers model: {_short(error)}") from error


def _from_hub(name: str) -> Path:
    """The config.json of a model on the hub, from its cache or downloaded.

    Raises:
        ValueError: no hub id, or it cannot be had; says how to get the file.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith(".json"):
        raise ValueError(f"{name} is not there; pass a model's config.json, the folder that holds it, or a hub id.")
    known = try_to_load_from_cache(name, CONFIG_NAME)
    if isinstance(known, str):
        return Path(known)
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME), timeout=HUB_SECONDS)  # the next asks six times
        return Path(hf_hub_download(name, CONFIG_NAME))
    except Exception as error:  # no network, no such model, a gate
        raise ValueError(
            f"{name} is no folder here, and its config.json cannot be had from the hub ({_short(error)}). Get "
            f"https://huggingface.co/{name}/resolve/main/{CONFIG_NAME} where there is a connection, and pass that file."
        ) from error


def _build(config: Any, name: str) -> Any:
    """The class that `architectures` names, or else the first of `KINDS` that can be built from the config."""
    named = [getattr(transformers, str(found), None) for found in getattr(config, "architectures", None) or []]
    makers: list[Any] = [c for c in named if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    makers = makers or [partial(kind.from_config, trust_remote_code=False) for kind in KINDS]
    for make in makers:
        try:
            with torch.device("meta"):
                return make(config)
        except Exception as error:  # what the model's code does with a config that it cannot use
            failure = f"{name}: no model can be built from its config: {type(error).__name__}: {_short(error)}"
    raise ValueError(failure)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


def _adapted_names(model: nn.Module, target_modules: str | Sequence[str], name: str) -> set[str]:
    """Names of the modules that the tuner itself replaces, found with the smallest possible experts."""
    targets: Any = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = MoELoRAConfig(r=1, num_experts=1, top_k=1, target_modules=targets)
    try:
        tuner = MoELoRAModel(model, {"default": config}, "default")
    except ValueError:
        raise
    except Exception as error:  # of PEFT's questions to a model of an unusual kind
        raise ValueError(f"{name}: {type(model).__name__} cannot be adapted: {_short(error)}") from error
    return {n.removeprefix("model.") for n, m in tuner.named_modules() if isinstance(m, MoELoRALayer)}
