"""What a saved adapter is, and what it has learnt, from its files alone: neither base model nor GPU is needed.

  python -m ds_moelora inspect outputs/run                        # summary, one line per kind of layer, what stands out
  python -m ds_moelora inspect outputs/run --layers               # one line per layer
  python -m ds_moelora inspect outputs/run --experts 'layers.3.*' # one line per expert of the layers that match
  python -m ds_moelora inspect outputs/run --json | jq '.layers[] | select(.duplicates != [])'

Columns: s is the scaling, |sBA| the Frobenius norm of what an expert can add to the weight (0 before training), cond A
and cond B the condition numbers of A^T A and B^T B that the Riemannian optimizers invert (inf for B before the first
step), bias the load of the router's favourite expert on isotropic inputs, over an even share (1: even; E/k: all of it),
alike the largest cosine between two experts' products (from 0.99 on they are called duplicates).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from ..tuner.files.adapter_file import SavedAdapter, read_adapter
from ..tuner.files.inspection import ExpertFacts, LayerFacts, layer_facts
from .tables import plain, table

SUMMARY = "layers, ranks, norms, condition numbers and routers of a saved adapter"
SHOWN_FINDINGS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `inspect`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    parser.add_argument("--layers", action="store_true", help="list every layer, not only kinds of layers")
    parser.add_argument("--experts", metavar="REGEX", help="list the experts of the layers whose names this matches")
    parser.add_argument("--json", action="store_true", help="everything, for scripts; inf and nan are null")


def run(args: argparse.Namespace) -> int:
    """Inspects and prints.

    Raises:
        ValueError: not an adapter of this package, no regular expression, or one that matches no layer.
    """
    adapter = read_adapter(args.adapter)
    facts = [layer_facts(layer) for layer in adapter.layers]
    chosen = _matching(facts, args.experts) if args.experts is not None else []
    if args.json:
        print(json.dumps(_finite(as_dict(args.adapter, adapter, facts)), indent=2))
        return 0
    parts = [plain(_headline(args.adapter, adapter, facts))]
    parts.append(layer_table("Layers", [(f.name, [f]) for f in facts]) if args.layers else _kinds_table(facts))
    parts += [expert_table(layer) for layer in chosen]
    parts.append("\n".join(f"- {plain(line)}" for line in findings(facts)) or "Nothing stands out.")
    print("\n\n".join(parts))
    return 0


def as_dict(name: str, adapter: SavedAdapter, facts: Sequence[LayerFacts]) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "adapter": name,
        "config": adapter.config.to_dict(),
        "bytes": adapter.num_bytes,
        "saved_whole": {key: list(tensor.shape) for key, tensor in adapter.others.items()},
        "layers": [asdict(layer) for layer in facts],
        "findings": findings(facts),
    }


def findings(facts: Sequence[LayerFacts]) -> list[str]:
    """What a reader should look at, one line each."""

    def leans(f: LayerFacts) -> bool:
        return f.num_experts > f.top_k and f.router_bias > 2

    tests: list[tuple[str, Callable[[LayerFacts], Any]]] = [
        ("weights that are not finite", lambda f: not f.finite),
        ("no training yet (every expert is zero)", lambda f: f.finite and all(e.norm == 0 for e in f.experts)),
        ("experts that add nothing", lambda f: 0 < sum(e.norm == 0 for e in f.experts) < f.num_experts),
        ("duplicate experts", lambda f: f.duplicates),
        ("a router that gives one expert over twice its share", leans),
    ]
    lines = []
    for what, test in tests:
        found = [f for f in facts if test(f)]
        if found:
            shown = ", ".join(_named(f, what) for f in found[:SHOWN_FINDINGS])
            more = ", ..." if len(found) > SHOWN_FINDINGS else ""
            where = "" if len(found) == len(facts) > 1 else f" ({shown}{more})"
            lines.append(f"{what}: {len(found)} of {len(facts)} layers{where}")
    return lines


def _named(layer: LayerFacts, what: str) -> str:
    if what == "duplicate experts":
        return f"{layer.name}: {' '.join(f'{i}={j}' for i, j in layer.duplicates[:SHOWN_FINDINGS])}"
    return layer.name


def _matching(facts: Sequence[LayerFacts], expression: str) -> list[LayerFacts]:
    try:
        found = [layer for layer in facts if re.search(expression, layer.name)]
    except re.error as error:
        raise ValueError(f"--experts {expression!r} is no regular expression: {error}.") from error
    if not found:
        raise ValueError(f"--experts {expression!r} matches none of {len(facts)} layers, e.g. {facts[0].name}.")
    return found


def _headline(name: str, adapter: SavedAdapter, facts: Sequence[LayerFacts]) -> str:
    config = adapter.config
    start = config.init_lora_weights if config.from_svd else "random A, zero B"
    extras = [text for on, text in ((config.shared_expert, "a shared expert"), (config.shared_A, "one A")) if on]
    whole = sorted({key.removeprefix("base_model.model.").rpartition(".")[0] for key in adapter.others})
    parameters = sum(f.parameters for f in facts)
    lines = [
        f"{name}: {len(facts)} layers, {parameters:,} parameters, {adapter.num_bytes / 1e6:.3g} MB",
        f"base model {config.base_model_name_or_path or 'unknown'}, task {config.task_type or 'none'}, "
        f"scaling {config.scaling}, start: {start}" + "".join(f", {text}" for text in extras),
    ]
    if config.trained_with:
        known = config.trained_with.items()
        lines.append(
            "trained with: " + ", ".join(f"{name} {_brief(value)}" for name, value in known if value is not None)
        )
    if whole:
        lines.append(f"saved whole: {', '.join(whole)}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    """A value of the record, which may be anybody's."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_brief(item)}" for name, item in value.items() if item is not None) + ")"
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _kinds_table(facts: Sequence[LayerFacts]) -> str:
    kinds: dict[tuple[str, tuple[float, ...]], list[LayerFacts]] = {}
    for layer in facts:
        sizes = (layer.in_features, layer.out_features, layer.rank, layer.num_experts, layer.top_k, layer.scaling)
        kinds.setdefault((_kind(layer.name), sizes), []).append(layer)
    return layer_table("Kinds of layers", [(name, group) for (name, _), group in kinds.items()])


def _kind(name: str) -> str:
    """What follows the layer's number: "self_attn.q_proj" of "model.layers.3.self_attn.q_proj"."""
    return re.split(r"\.\d+\.", name)[-1]


def layer_table(title: str, groups: Sequence[tuple[str, Sequence[LayerFacts]]]) -> str:
    """One line per group of layers of equal sizes."""
    header = ("layer", "number", "in", "out", "r", "E", "k", "s", "|A| median", "|sBA| median", "|sBA| max")
    rows = []
    for name, group in groups:
        first = group[0]
        sizes = (first.in_features, first.out_features, first.rank, first.num_experts, first.top_k)
        experts = [expert for layer in group for expert in layer.experts]
        norms = [expert.norm for expert in experts]
        rows.append(
            (
                name,
                str(len(group)),
                *map(str, sizes),
                f"{first.scaling:.3g}",
                f"{median(expert.norm_A for expert in experts):.3g}",
                f"{median(norms):.3g}",
                f"{_largest(norms):.3g}",
                f"{_largest(expert.condition_A for expert in experts):.2g}",
                f"{_largest(expert.condition_B for expert in experts):.2g}",
                f"{_largest(layer.router_bias for layer in group):.2f}",
                f"{_largest(layer.similarity for layer in group):.2f}",
            )
        )
    return table(title, (*header, "cond A max", "cond B max", "bias max", "alike max"), rows)


def expert_table(layer: LayerFacts) -> str:
    """One line per expert of a layer."""

    def cells(number: int, expert: ExpertFacts) -> tuple[str, ...]:
        moved = () if expert.moved is None else (f"{expert.moved:.3g}",)
        twins = [str(j if i == number else i) for i, j in layer.duplicates if number in (i, j)]
        sizes = (f"{expert.norm_A:.3g}", f"{expert.norm_B:.3g}", f"{expert.norm:.3g}", *moved)
        conditions = (f"{expert.condition_A:.2g}", f"{expert.condition_B:.2g}")
        return (str(number), *sizes, *conditions, f"{expert.share:.2f}", ", ".join(twins))

    moved = () if layer.experts[0].moved is None else ("moved",)
    header = ("expert", "|A|", "|B|", "|sBA|", *moved, "cond A", "cond B", "share x E/k", "duplicates")
    shared = "" if layer.shared_norm is None else f"; shared expert |sBA| {layer.shared_norm:.3g}"
    title = f"{layer.name}: router rows' mean norm {layer.router_norm:.3g}{shared}"
    return table(title, header, [cells(i, expert) for i, expert in enumerate(layer.experts)])


def _largest(values: Iterable[float]) -> float:
    """The largest value; nan if there is one."""
    known = list(values)
    return math.nan if any(map(math.isnan, known)) else max(known)


def _finite(value: Any) -> Any:
    """JSON knows neither inf nor nan."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
