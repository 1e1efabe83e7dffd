"""Small MoE base models of transformers, with PEFT's LoRA on their experts."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 12, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
    "olmoe": {"num_experts": 4},
}


def base_model(architecture: str, **more: Any) -> Any:
    torch.manual_seed(0)
    values = {**COMMON, **ARCHITECTURES[architecture], **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values))
    for p in model.parameters():  # gpt-oss leaves some of its weights empty
        nn.init.normal_(p, std=0.2)
    return model


def lora_model(architecture: str, **config: Any) -> Any:
    """With B away from zero."""
    options = {"r": 3, "lora_alpha": 6, "target_parameters": TARGETS, "target_modules": [], "init_lora_weights": False}
    return get_peft_model(base_model(architecture), LoraConfig(**{**options, **config}))


def tokens() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 64
