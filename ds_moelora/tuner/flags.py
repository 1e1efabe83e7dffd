"""A mixture described on a command line: the flags, which are fields of `MoELoRAConfig`, and the way back to one."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, get_type_hints

from peft import PeftConfig

from .config import PATTERNS, MoELoRAConfig

# Fields of the configuration that are no flags: a regular expression in --target_modules says the same.
_NO_FLAGS = {item.name for item in fields(PeftConfig)} | {
    # target_parameters is the launcher's own flag: it means PEFT's LoRA alone, too
    *("exclude_modules", "layers_to_transform", "layers_pattern", "trained_with", "target_parameters")
}
# What a command line must write otherwise than Python: type, default, and what is said of it.
_FORMS: dict[str, tuple[Any, Any, str]] = {
    "target_modules": (list[str], ["all-linear"], "Module names, one regular expression, or all-linear."),
    "init_lora_weights": (
        str,
        "true",
        "true: B starts at zero. goat, goat_mini, pissa, milora: from the weight's SVD.",
    ),
    "modules_to_save": (list[str], [], "Modules trained and saved in full beside the adapter."),
    **{
        name: (str | None, None, f"As JSON, e.g. '{{\"q_proj\": 4}}': modules whose {PATTERNS[name]} differs.")
        for name in PATTERNS
    },
}


def adapter_flags(without: tuple[str, ...] = ()) -> list[tuple[str, Any, Any]]:
    """Name, type and dataclass field of every flag that is a field of `MoELoRAConfig`, with that field's help.

    Args:
        without: fields that are no flags here.
    """
    types, flags = get_type_hints(MoELoRAConfig), []
    for item in fields(MoELoRAConfig):
        if item.name in _NO_FLAGS or item.name in without:
            continue
        form = (types[item.name], item.default, item.metadata["help"])
        kind, default, help_text = _FORMS.get(item.name, form)
        metadata = {"help": help_text, "aliases": item.metadata.get("aliases", [])}
        if isinstance(default, list):
            made = field(default_factory=functools.partial(list, default), metadata=metadata)
        else:
            made = field(default=default, metadata=metadata)
        flags.append((item.name, kind, made))
    return flags


def config_from_flags(flags: Mapping[str, Any], **others: Any) -> MoELoRAConfig:
    """The configuration that flags describe.

    Args:
        flags: name -> value, as parsed. others: further fields of the configuration.

    Raises:
        ValueError: a value outside its bounds, or no JSON where JSON is due.
    """
    values = dict(flags)
    values |= {name: _read_pattern(name, values[name]) for name in PATTERNS}
    # A single plain name means "modules called so"; a string would be a regular expression for the full path.
    if values["target_modules"] == ["all-linear"] or is_pattern(values["target_modules"]):
        values["target_modules"] = values["target_modules"][0]
    start = values["init_lora_weights"]
    values["init_lora_weights"] = {"true": True, "false": False}.get(start.lower(), start)
    values["modules_to_save"] = values["modules_to_save"] or None
    return MoELoRAConfig(**values, **others)


def is_pattern(targets: list[str]) -> bool:
    """Whether `--target_modules` is one regular expression for full names."""
    return len(targets) == 1 and re.fullmatch(r"[\w.-]+", targets[0]) is None


def _read_pattern(flag: str, value: Any) -> Any:
    """A pattern from the command line (JSON) or a recipe (a mapping, as it is); {} without one."""
    if not isinstance(value, str):
        return value or {}
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{flag} {value} is not JSON ({error}); write e.g. '{{\"q_proj\": 4}}'.") from error
