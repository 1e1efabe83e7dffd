"""`--target_parameters`: PEFT's LoRA on the stacked experts of a MoE base, whose own router is the mixture's."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from ds_moelora import use_lora_experts
from ds_moelora.tuner.flags import config_from_flags, is_pattern
from ds_moelora.tuner.layer import MoELoRALayer
from launch.checks.arguments import Arguments, non_defaults
from launch.checks.errors import UserError, say

ALL = "experts"
OF_LORA = ("r", "lora_alpha", "target_modules", "modules_to_save")


def lora_config(arguments: Arguments, task_type: Any) -> PeftConfig | None:
    """The adapter that the flags describe; None without --target_parameters.

    PEFT's LoRA; with flags of mixtures, such as --num_experts, mixtures on the modules beside LoRA on the experts.
    """
    targets, adapter = arguments.run.target_parameters, arguments.adapter
    if not targets:
        return None
    if arguments.run.load_in_4bit:
        raise UserError("--load_in_4bit leaves stacked experts as they are; leave it out with --target_parameters.")
    others = sorted(non_defaults(adapter).keys() - {*OF_LORA})
    if others and (adapter.target_modules == ["none"] or others == ["lora_dropout"]):
        raise UserError(
            f"--{others[0]} is of mixtures on modules, and PEFT's LoRA on stacked experts has none; leave it out, or "
            "name --target_modules and --num_experts."
        )
    modules: Any = [] if adapter.target_modules == ["none"] else adapter.target_modules
    if modules == ["all-linear"] or is_pattern(modules):
        modules = modules[0]
    try:
        if others:
            return config_from_flags(vars(adapter), task_type=task_type, target_parameters=targets)
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
    """Replaces "experts" by the names of the model's stacked parameters."""
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
    adapted, counts = {}, {"experts": 0, "modules": 0}
    for name, parameter in model.named_parameters():
        of_experts = ".experts." in name
        if parameter.requires_grad:
            counts["experts" if of_experts else "modules"] += getattr(parameter, "ds_numel", parameter.numel())
    for module in model.modules():
        if isinstance(module, (LoraLayer, MoELoRALayer)):
            kind = "stacked parameters" if isinstance(module, ParamWrapper) else "modules"
            kind = "mixtures on modules" if isinstance(module, MoELoRALayer) else kind
            adapted[kind] = adapted.get(kind, 0) + 1
    try:
        how = f"{use_lora_experts(model)} experts modules are computed by grouped products, gates scale their gradients"
    except ValueError as error:
        how = f"PEFT's own function computes the experts ({error}), and gate_scaling has no effect on them"
    what = ", ".join(f"{count} {kind}" for kind, count in sorted(adapted.items()))
    say(
        f"The adapter is on {what}; it trains {counts['experts']:,} parameters on experts and {counts['modules']:,} on "
        f"modules; {how}."
    )
