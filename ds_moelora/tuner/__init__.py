"""Mixtures of LoRA experts as a PEFT tuner."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .base_experts import use_lora_experts
from .config import PEFT_TYPE, PEFT_TYPES, MoELoRAConfig
from .experts import MoELoRAExperts
from .files.card import TrainingRecord, record_training, without_card
from .files.conversion import save_without_residual
from .files.saving import gather_experts, sharded_experts
from .layer import MoELoRALayer
from .model import PREFIX, MoELoRAModel
from .start.from_lora import start_from_lora
from .tags import tag_lora_pairs

__all__ = [
    "MoELoRAConfig",
    "MoELoRAExperts",
    "MoELoRALayer",
    "MoELoRAModel",
    "TrainingRecord",
    "gather_experts",
    "record_training",
    "register_with_peft",
    "save_without_residual",
    "sharded_experts",
    "start_from_lora",
    "tag_lora_pairs",
    "use_lora_experts",
    "without_card",
]


def register_with_peft() -> None:
    """Enters the type "MOELORA" into PEFT's tables by PEFT's own function; calling it again changes nothing."""
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=MoELoRAConfig, model_cls=MoELoRAModel, prefix=PREFIX)
        PEFT_TYPE_TO_CONFIG_MAPPING.update(dict.fromkeys(PEFT_TYPES, MoELoRAConfig))  # PEFT's way from file to class
