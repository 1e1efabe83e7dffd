"""Mixtures of LoRA experts as a PEFT tuner."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner

from .config import PEFT_TYPE, MoELoRAConfig
from .experts import MoELoRAExperts
from .files.card import TrainingRecord, describe_adapters_in_cards, record_training
from .files.conversion import save_without_residual
from .files.saving import append_experts, gather_experts, let_first_rank_write, sharded_experts, without_experts
from .layer import MoELoRALayer
from .model import PREFIX, MoELoRAModel
from .start.svd_init import load_without_decomposing
from .tags import tag_lora_pairs

__all__ = [
    "MoELoRAConfig",
    "MoELoRAExperts",
    "MoELoRALayer",
    "MoELoRAModel",
    "TrainingRecord",
    "append_experts",
    "gather_experts",
    "record_training",
    "register_with_peft",
    "save_without_residual",
    "sharded_experts",
    "tag_lora_pairs",
    "without_experts",
]


def register_with_peft() -> None:
    """Makes PEFT know the type "MOELORA"; calling it again changes nothing.

    PEFT's own registration wants a member of its PeftType enum; its tables take a plain string as well.

    Raises:
        ImportError: this PEFT cannot save such an adapter.
    """
    if not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
        raise ImportError("This version of PEFT is too old for ds_moelora: pip install 'peft>=0.21'.")
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MoELoRAConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MoELoRAModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
    describe_adapters_in_cards()
    let_first_rank_write()
    load_without_decomposing()
