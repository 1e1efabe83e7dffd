"""Settings of single layers: `rank_pattern` and its like, resolved to the configuration that one layer is built from.

As in PEFT's LoRA, a pattern maps regular expressions (or plain names) to values. It applies to a module whose name is
`(anything.)?expression`; the first expression that fits wins. Unlike there, an expression that decides no adapted
module is an error: something else would be trained than was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from peft.utils.other import get_pattern_key

from .config import PATTERNS, MoELoRAConfig


def layer_config(config: MoELoRAConfig, layer_name: str) -> MoELoRAConfig:
    """The configuration of one layer: r, lora_alpha, num_experts and top_k from the patterns that fit its name.

    Args:
        config: the adapter's. layer_name: the module's qualified name in the base model.

    Returns:
        a configuration without patterns, checked (again: fields can be set after a config was made).

    Raises:
        ValueError: the values do not fit each other (e.g. top_k > num_experts), naming the layer.
    """
    values: dict[str, Any] = {}
    for pattern, field in PATTERNS.items():
        table = getattr(config, pattern)
        key = get_pattern_key(table.keys(), layer_name)
        values |= {pattern: {}, **({field: table[key]} if key in table else {})}
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{layer_name}: {error}") from error


def check_patterns(config: MoELoRAConfig, layer_names: Iterable[str]) -> None:
    """Refuses patterns that decide no adapted module, or give one values that do not go together.

    Args:
        layer_names: the modules that will be adapted.

    Raises:
        ValueError: naming the expressions, or the layer.
    """
    names = list(layer_names)
    for pattern in PATTERNS:
        table = getattr(config, pattern)
        unused = sorted(table.keys() - {get_pattern_key(table.keys(), name) for name in names})
        if unused:
            raise ValueError(
                f"{pattern}: {unused} fit none of the {len(names)} adapted modules, or an earlier key fits first. Give "
                "the end of a module's name, or a regular expression that reaches to its end, such as 'q_proj' or "
                f"r'layers\\.3\\..*', general ones last; adapted are {', '.join(names[:6])}"
                f"{', ...' if len(names) > 6 else ''}."
            )
    for name in names:
        layer_config(config, name)
