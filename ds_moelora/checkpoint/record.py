"""What a run was: compared with the run that wants to go on from its checkpoint, before anything is loaded.

A record is flat: {"adapter.default.r": 8, "base.hidden_size": 2048, "optimizer.class": "AdamW", ...}. The first
pattern of `TABLE` that fits a name decides what becomes of a difference; docs/checkpoints.md has the table for people.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..optimizer.sharding.zero import whole_shape
from ..redaction import redact_text
from .processes import gathered
from .trained import Run, topology, trained_shapes

REFUSE, SAY, IGNORE = "refuse", "say", "ignore"
SAMPLED_PARAMETERS, SAMPLED_VALUES = 64, 16
SAMPLED_NUMEL = 1 << 24  # larger parameters are not gathered for a sample
# Two loads of the same weights differ by rounding: a residual (W - s B A) by sums in another order, a bf16 copy more;
# so a value may also be its neighbour in its own type.
SAME_DTYPE, OTHER_DTYPE = 1e-5, 1e-2

TABLE: tuple[tuple[str, str], ...] = (
    # Places, and how the same mathematics is computed.
    ("adapter.*.base_model_name_or_path", IGNORE),
    ("adapter.*.revision", IGNORE),
    ("adapter.*.inference_mode", IGNORE),
    ("adapter.*.peft_version", IGNORE),
    ("adapter.*.svd_cache_dir", IGNORE),
    ("adapter.*.trained_with", IGNORE),  # flags, data and optimizer are compared themselves
    ("adapter.*.expert_compute", IGNORE),
    ("adapter.*.ep_*", IGNORE),  # said as topology
    # Regularisation may change in the course of a run.
    ("adapter.*.lora_dropout", SAY),
    ("adapter.*.router_aux_loss_coef", SAY),
    ("adapter.*.router_z_loss_coef", SAY),
    ("adapter.*.router_jitter", SAY),
    ("adapter.*", REFUSE),
    ("base.*name_or_path", IGNORE),
    ("base.*transformers_version", IGNORE),
    ("base.*dtype", IGNORE),  # said as precision by the launcher; weights are compared
    ("base.*use_cache", IGNORE),
    ("base.*attn_implementation*", IGNORE),
    ("base.*output_*", IGNORE),
    ("base.*return_dict", IGNORE),
    ("base.*token_id", SAY),
    ("base.*router_aux_loss_coef", SAY),  # the adapter puts its own coefficient there for TRL (loss_hooks.py)
    ("base.*", REFUSE),
    ("trained.*", REFUSE),
    ("optimizer.class", REFUSE),
    ("optimizer.foreach", IGNORE),
    ("optimizer.fused", IGNORE),
    ("optimizer.capturable", IGNORE),
    ("optimizer.*", SAY),
    ("topology.*", SAY),
)


@dataclass(frozen=True)
class Difference:
    """One entry in which two records differ; `None` stands for one that is not there."""

    name: str
    saved: Any
    mine: Any
    verdict: str

    def __str__(self) -> str:
        return f"{self.name} {_short(self.saved)} -> {_short(self.mine)}"


def verdict(name: str, table: Iterable[tuple[str, str]] = TABLE) -> str:
    """What becomes of a difference in an entry; entries that no pattern fits are said."""
    return next((found for pattern, found in table if fnmatchcase(name, pattern)), SAY)


def compare(
    saved: Mapping[str, Any], mine: Mapping[str, Any], table: Iterable[tuple[str, str]] = TABLE
) -> list[Difference]:
    """All differences of two records that are not ignored."""
    table = tuple(table)
    differences = []
    for name in sorted({*saved, *mine}):
        if name == "base.samples":
            differences += _compare_samples(saved.get(name) or {}, mine.get(name) or {})
        elif saved.get(name) != mine.get(name):
            found = verdict(name, table)
            if found != IGNORE:
                differences.append(Difference(name, saved.get(name), mine.get(name), found))
    return differences


def refuse_others(differences: Iterable[Difference], what: str) -> list[str]:
    """The lines to say.

    Raises:
        ValueError: differences that cannot be meant, with both values of each.
    """
    refused = [str(d) for d in differences if d.verdict == REFUSE]
    if refused:
        more = f", and {len(refused) - 6} more" if len(refused) > 6 else ""
        raise ValueError(
            f"{what} is of another run: {'; '.join(refused[:6])}{more}. Go on with the settings of the run that saved "
            "it, or start a new run in another folder."
        )
    return [f"{what}: {d}; this run's value holds." for d in differences if d.verdict == SAY]


def adapter_record(config: Any, name: str = "default") -> dict[str, Any]:
    """The entries of one adapter's PEFT configuration."""
    return {f"adapter.{name}.{key}": plain(value) for key, value in config.to_dict().items()}


def run_record(run: Run) -> dict[str, Any]:
    """What a run trains, with what, and how it is spread. A collective call: ZeRO-3's samples are gathered."""
    record: dict[str, Any] = {}
    for name, config in getattr(run.module, "peft_config", {}).items():
        record |= adapter_record(config, name)
    base: Any = getattr(run.module, "config", None)
    if hasattr(base, "to_dict"):
        record |= {f"base.{key}": plain(value) for key, value in base.to_dict().items()}
    record["base.samples"] = sample_weights(run.module)
    record["optimizer.class"] = type(run.optimizer).__name__
    record |= {f"optimizer.{key}": value for key, value in optimizer_settings(run.optimizer).items()}
    record |= {f"trained.{name}": list(shape) for name, shape in trained_shapes(run.module).items()}
    return record | {f"topology.{key}": value for key, value in topology(run).items()}


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every setting but the learning rate; a list where groups differ."""
    groups, found = optimizer.param_groups, {}
    for key in sorted({key for group in groups for key in group} - _NOT_SETTINGS):
        values = [plain(group.get(key)) for group in groups]
        found[key] = values[0] if all(value == values[0] for value in values) else values
    return found


_NOT_SETTINGS = {
    *("params", "lr", "initial_lr", "group_index", "name", "moe", "step", "param_names"),
    *("is_expert_group", "max_lr", "min_lr"),
}


@torch.no_grad()
def sample_weights(module: nn.Module) -> dict[str, Any]:
    """{name: [dtype, values]} of one frozen parameter of every kind, to tell one base model from another."""
    kinds: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, param in sorted(module.named_parameters()):
        known = param.is_floating_point() and not (param.requires_grad or param.is_meta)
        if known and 0 < math.prod(whole_shape(param)) <= SAMPLED_NUMEL:
            kinds.setdefault(re.sub(r"\d+", "", name), []).append((name, param))
    chosen = [found[7 * number % len(found)] for number, found in enumerate(kinds.values())]  # of different layers
    samples: dict[str, Any] = {}
    for name, param in chosen[:: max(-(-len(chosen) // SAMPLED_PARAMETERS), 1)]:
        with gathered([param]):
            samples[name] = _sample(param)
    return samples


def _sample(param: torch.Tensor) -> list[Any]:
    flat = param.detach().reshape(-1)
    values = flat[:: max(flat.numel() // SAMPLED_VALUES, 1)][:SAMPLED_VALUES]
    return [str(param.dtype), values.float().cpu().tolist()]


def _compare_samples(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[Difference]:
    for name in sorted({*saved, *mine}):
        if name not in saved or name not in mine:
            return [Difference(f"frozen parameter {name}", name in saved, name in mine, REFUSE)]
        (dtype, old), (own_dtype, new) = saved[name], mine[name]
        scale = max(map(abs, [*old, *new]), default=0.0)
        allowed, step = OTHER_DTYPE * scale, 0.0
        if dtype == own_dtype:
            allowed, step = SAME_DTYPE * scale, torch.finfo(getattr(torch, own_dtype.removeprefix("torch."))).eps
        if len(old) != len(new) or any(
            abs(a - b) > max(allowed, step * max(abs(a), abs(b))) for a, b in zip(old, new, strict=True)
        ):
            return [Difference(f"weights of the base model ({name})", old[:3], new[:3], REFUSE)]
    return []


def plain(value: Any) -> Any:
    """A value as JSON gives it back, without secrets in its texts; sets in order, other objects by their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=str)
    if value is None or isinstance(value, int | float):
        return value
    return redact_text(str(getattr(value, "value", value)))


def _short(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
