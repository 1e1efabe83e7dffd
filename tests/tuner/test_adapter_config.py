"""The configuration: ranges, messages, and the way through JSON."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig

from ds_moelora import MoELoRAConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5, "num_experts": 4}, r"top_k=5 is larger than num_experts=4.*at most 4"),
        ({"top_k": True}, r"top_k=True must be an integer"),
        ({"r": 0}, r"r=0 must be an integer >= 1"),
        ({"num_experts": "4"}, r"num_experts='4' must be an integer"),
        ({"lora_alpha": 0}, r"lora_alpha=0 must be a number > 0"),
        ({"lora_alpha": float("inf")}, r"lora_alpha=inf must be"),
        ({"lora_alpha": None}, r"lora_alpha=None must be"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must be a number in \[0, 1\)"),
        ({"router_aux_loss_coef": -1e-3}, r"router_aux_loss_coef=-0.001 must be a number >= 0"),
        ({"router_z_loss_coef": float("nan")}, r"router_z_loss_coef=nan must be"),
        ({"router_temperature": 0}, r"router_temperature=0 must be a number > 0"),
        ({"router_jitter": True}, r"router_jitter=True must be"),
        ({"top_p": 1.0}, r"top_p=1.0 must be a number in \(0, 1\)"),
        ({"scaling": "gaot"}, r"scaling='gaot' is unknown; use one of alpha, rslora, goat"),
        ({"init_lora_weights": "gaussian"}, r"init_lora_weights='gaussian' is unknown; use True.*False"),
        ({"init_lora_weights": 1}, r"init_lora_weights=1 is unknown"),
        ({"ep_size": 3, "num_experts": 8}, r"ep_size=3 must divide num_experts; with num_experts=8.*: 1, 2, 4, 8\."),
        ({"ep_dispatch": "experts"}, r"ep_dispatch='experts' is unknown; use one of auto, weights, tokens"),
        ({"ep_dispatch": "tokens"}, r"ep_dispatch='tokens' has no effect without ep_size > 1"),
        ({"expert_compute": "fast"}, r"expert_compute='fast' is unknown; use one of auto, dense, grouped, fused"),
        ({"target_modules": []}, r"target_modules=set\(\) is empty"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, r"layers_to_transform=\[0\] cannot be used"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, r"layers_pattern='h' has no effect"),
        ({"task_type": "POETRY"}, r"Invalid task type"),
    ],
)
def test_bad_values_are_refused_with_value_bound_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        MoELoRAConfig(**fields)


def test_round_trip_through_json(tmp_path):
    config = MoELoRAConfig(
        r=3,
        num_experts=5,
        top_k=4,
        lora_alpha=7.5,
        lora_dropout=0.25,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=["x"],
        scaling="rslora",
        router_aux_loss_coef=0.0,
        modules_to_save=["score"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"].startswith("MOELORA ")
    assert written["target_modules"] == ["q_proj", "v_proj"]
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is MoELoRAConfig
    assert loaded == config


def test_scaling():
    assert MoELoRAConfig(r=4, lora_alpha=16).scaling_of(32) == 4
    assert MoELoRAConfig(r=4, lora_alpha=16, scaling="rslora").scaling_of(32) == 8
