"""What the loops of this folder train on: fixed token ids, so that every loop sees the same batches."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from assets import ADAPTER, EPS, LR, NUM_EXPERTS, STEPS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

BATCH, LENGTH = 4, 16
OPTIONS = {"lr": LR, "betas": (0.9, 0.999), "eps": EPS, "weight_decay": 0.0}
ASSETS = Path(os.environ.get("ASSETS", "assets"))


def tokens() -> torch.Tensor:
    """(STEPS * BATCH, LENGTH) token ids."""
    return torch.randint(2, 200, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def model(kind: str) -> PeftModel:
    """The tiny Llama with a LoRA ("lora") or a mixture of them ("moe"), in training mode."""
    options = {**ADAPTER, "task_type": "CAUSAL_LM"}
    if kind == "lora":
        config = LoraConfig(**options)
    else:
        from ds_moelora import MoELoRAConfig

        config = MoELoRAConfig(num_experts=NUM_EXPERTS, **options)
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    torch.manual_seed(0)
    return get_peft_model(base, config).train()


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Its parameters with gradients."""
    return [p for p in module.parameters() if p.requires_grad]
