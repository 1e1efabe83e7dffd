"""Which modules of a base model get a mixture: names expanded and checked, before the first module is replaced.

Training and loading, named targets and "all-linear" pass through the same two functions: `expand` and `check_targets`.
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import inspect
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import MoELoRAConfig
from .layer import MoELoRALayer
from .start.base_weight import in_out_features

# What some branch of a Mamba mixer's forward pass (a fused kernel, an unquantised weight) reads, and another one calls.
_OFTEN_UNCALLED: dict[str, tuple[str, ...]] = {
    "bamba": ("out_proj",),
    "falcon_h1": ("out_proj",),
    "falcon_mamba": ("out_proj", "dt_proj"),
    "granitemoehybrid": ("out_proj",),
    "jamba": ("dt_proj",),
    "mamba": ("out_proj",),
    "mamba2": ("out_proj",),
    "nemotron_h": ("out_proj",),
    "zamba2": ("out_proj",),
}
# What may be asked of a weight without computing with it.
_HARMLESS = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may be targets: not the root, and nothing inside an adapted layer."""
    modules = {name: module for name, module in model.named_modules() if name}
    inside = tuple(name + "." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in modules.items() if not name.startswith(inside or ("\0",))}


def expand(config: MoELoRAConfig, model: nn.Module) -> Any:
    """`target_modules` with PEFT's default for the architecture, or "all-linear", as names that this model has.

    all-linear is PEFT's: every nn.Linear and Conv1D but the output head; also those that another adapter adapts. What
    no forward pass calls is left out with a warning, and so are experts that are stacked in one parameter.
    """
    targets: Any = config.target_modules
    if not isinstance(targets, str):
        names = list(candidates(model))
        return {entry for entry in targets if _matches(entry, names)} or targets
    if targets.lower() != "all-linear":
        return targets
    found: set[str] = set(_maybe_include_all_linear_layers(copy.copy(config), model).target_modules)
    of_head: Any = getattr(model, "get_output_embeddings", None)
    head = of_head() if of_head is not None else None
    for name, module in model.named_modules():
        adapted = isinstance(module, MoELoRALayer) and isinstance(module.base_layer, (nn.Linear, Conv1D))
        if adapted and module is not head:
            found.add(name)
    idle = uncalled(model)
    if found & idle.keys():
        warnings.warn(
            f"target_modules='all-linear' leaves out {_some_names(found & idle.keys())}: the model reads their weight "
            "and does not call them, so that a mixture there would never run.",
            stacklevel=2,
        )
    if not config.target_parameters:
        _warn_of_stacked(model, len(found - idle.keys()))
    return found - idle.keys()


def _warn_of_stacked(model: nn.Module, num_adapted: int) -> None:
    """Says which parameters hold several matrices each (transformers 5: a mixture's experts), and who adapts them."""
    stacked = {}
    for name, module in candidates(model).items():
        for key, param in module.named_parameters(recurse=False):
            shape = tuple(getattr(param, "ds_shape", param.shape))
            is_conv = isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
            if len(shape) == 3 and min(shape) > 1 and not is_conv and param.is_floating_point():
                stacked[f"{name}.{key}"] = math.prod(shape)
    if stacked:
        total = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters())
        endings = sorted({".".join(name.split(".")[-2:]) for name in stacked})
        left = sum(stacked.values())
        warnings.warn(
            f"target_modules='all-linear' adapts {num_adapted} modules and leaves out {_some_names(stacked)}: matrices "
            f"stacked in one parameter, {left:,} of the base model's {total:,} weights ({left / total:.0%}). PEFT's "
            f"LoRA adapts them, beside the mixtures: target_parameters={endings} in the configuration, "
            "--target_parameters experts for launch/train.py.",
            stacklevel=3,
        )


def check_targets(config: MoELoRAConfig, model: nn.Module, matches: Callable[[Any, str], Any]) -> None:
    """Refuses target modules that are not there or cannot be adapted.

    PEFT itself raises only if nothing at all matches, so one misspelt name among several would train silently less.

    Args:
        config: with `target_modules` expanded. model: the base model.
        matches: PEFT's rule: (config, name) -> true if the module is a target.

    Raises:
        ValueError: an entry matches no module, or a target cannot be adapted; all of them are named.
    """
    targets, modules = config.target_modules, candidates(model)
    if targets is not None:
        if isinstance(targets, str):
            absent = [] if any(re.fullmatch(targets, name) for name in modules) else [targets]
        else:
            absent = sorted(entry for entry in targets if not _matches(entry, modules))
        if absent:
            endings = sorted({name.rpartition(".")[2] for name, m in modules.items() if _can_adapt(m)} - {""})
            near = {n for entry in absent for n in difflib.get_close_matches(entry.rpartition(".")[2], endings, n=1)}
            raise ValueError(
                f"target_modules: {absent} not found in the base model. "
                + (f"Did you mean {sorted(near)}? " if near else "")
                + f"Modules that can be adapted end in {[e for e in endings if not e.isdigit()][:30]}."
            )
    idle, bad = uncalled(model), []
    for name, module in modules.items():
        if not matches(config, name):
            continue
        if name in idle:
            bad.append(f"{name} ({idle[name]} reads its weight and never calls it)")
        elif not _can_adapt(module):
            bad.append(f"{name} ({type(module).__name__})")
    if bad:
        raise ValueError(
            f"These target modules cannot be adapted: {', '.join(bad)}. MoE-LoRA adapts nn.Linear, Conv1D and modules "
            "with in_features and out_features; change target_modules, or name these in exclude_modules."
        )


def target_names(config: MoELoRAConfig, model: nn.Module, matches: Callable[[Any, str], Any]) -> list[str]:
    """Qualified names of the modules that a configuration adapts; arguments as in `check_targets`."""
    return [name for name in candidates(model) if matches(config, name)]


def uncalled(model: nn.Module) -> dict[str, str]:
    """Names of the modules whose weight another module reads in its forward pass without calling them, and its class.

    Found in the source of each class's `forward` and the methods that it calls; a class without source tells nothing.
    `loss_hooks` names what is left over after the first training step.
    """
    found = {}
    modules = dict(model.named_modules())
    often = _OFTEN_UNCALLED.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    for name, module in modules.items():
        for child in weights_read_by(type(module)):  # type: ignore[arg-type]
            found[f"{name}.{child}" if name else child] = type(module).__name__
        if "mamba" in type(module).__name__.lower() or "mixer" in type(module).__name__.lower():
            found |= {f"{name}.{child}": type(module).__name__ for child in often}
    return {name: reader for name, reader in found.items() if name in modules}


@functools.cache
def weights_read_by(cls: type) -> frozenset[str]:
    """Dotted names, from self, of submodules whose `weight` a class computes with, and which it never calls."""
    todo, seen, read, called = ["forward"], set(), set(), set()
    while todo:
        method = todo.pop()
        if method in seen:
            continue
        seen.add(method)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.getattr_static(cls, method))))
        except (AttributeError, OSError, TypeError, SyntaxError):
            continue
        harmless: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in _HARMLESS:
                harmless.add(id(node.value))
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr"):
                    harmless |= {id(argument) for argument in node.args}
                path = _path_from_self(node.func)
                called.add(path)
                todo += [path] if path and "." not in path else []
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr != "weight" or not isinstance(node.ctx, ast.Load):
                continue
            if id(node) not in harmless:
                read.add(_path_from_self(node.value))
    return frozenset(path for path in read - called if path)


def _path_from_self(node: ast.AST) -> str | None:
    """ "a.b" of the expression self.a.b; None of any other, and of self alone."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" and parts else None


def _some_names(names: Iterable[str]) -> str:
    """Names, with layers' numbers as stars."""
    kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})
    return ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else "")


def _matches(entry: str, names: Iterable[str]) -> bool:
    return any(name == entry or name.endswith("." + entry) for name in names)


def _can_adapt(module: nn.Module) -> bool:
    return isinstance(module, MoELoRALayer) or in_out_features(module) is not None
