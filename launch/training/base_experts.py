"""`--target_parameters`: PEFT's LoRA on the stacked experts of a MoE base, whose own router is the mixture's."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from ds_moelora import use_lora_experts
from ds_moelora.tuner.flags import is_pattern
from launch.checks.arguments import Arguments, non_defaults
from launch.checks.errors import UserError, say

ALL = "experts"
OF_LORA = ("r", "lora_alpha", "target_modules", "modules_to_save")


def lora_config(arguments: Arguments, task_type: Any) -> LoraConfig | None:
    """The adapter that the flags describe; None without --target_parameters.

    Raises:
        UserError: a flag of mixtures of this package's own, or 4 bits.
    """
    targets, adapter = arguments.run.target_parameters, arguments.adapter
    if not targets:
        return None
    if others := sorted(non_defaults(adapter).keys() - {*OF_LORA}):
        raise UserError(
            f"--{others[0]}: with --target_parameters the adapter is PEFT's LoRA, and the mixture is the base's own; "
            f"leave it out ({', '.join(OF_LORA)} can be set), or leave out --target_parameters."
        )
    if arguments.run.load_in_4bit:
        raise UserError("--load_in_4bit leaves stacked experts as they are; leave it out with --target_parameters.")
    modules: Any = [] if adapter.target_modules == ["none"] else adapter.target_modules
    if modules == ["all-linear"] or is_pattern(modules):
        modules = modules[0]
    try:
        return LoraConfig(
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            target_modules=modules,
            target_parameters=targets,
            modules_to_save=adapter.modules_to_save or None,
            task_type=task_type,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter: {error}") from error


def name_experts(config: Any, skeleton: nn.Module) -> None:
    """Replaces "experts" by the names of the model's stacked parameters.

    Raises:
        UserError: it has none.
    """
    if getattr(config, "target_parameters", None) != [ALL]:
        return
    found = {
        ".".join([*name.split(".")[-2:], key])
        for name, module in skeleton.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    if not found:
        raise UserError(f"--target_parameters {ALL}: {type(skeleton).__name__} keeps no experts in stacked parameters.")
    config.target_parameters = sorted(found)


def settle(model: PeftModel) -> None:
    """Has the experts computed by grouped products where that is possible, and says what is adapted."""
    pairs = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" in name:
            pairs.setdefault("experts" if ".experts." in name else "modules", []).append(parameter)
    counts = [f"{sum(getattr(p, 'ds_numel', p.numel()) for p in ps):,} on {kind}" for kind, ps in sorted(pairs.items())]
    try:
        how = f"{use_lora_experts(model)} experts modules are computed by grouped products, gates scale their gradients"
    except ValueError as error:
        how = f"PEFT's own function computes the experts ({error}), and gate_scaling has no effect on them"
    say(f"LoRA: trained parameters {', '.join(counts)}; {how}.")
