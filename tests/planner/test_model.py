"""Config files of every kind that transformers writes, and some that it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING

from ds_moelora.planner.hardware import hardware
from ds_moelora.planner.model import describe_model
from ds_moelora.planner.planner import make_plan
from ds_moelora.planner.workload import Workload
from ds_moelora.tuner.start.base_weight import in_out_features

WORK = Workload(num_experts=4, rank=2, gpus=2, sequence_length=64)


def described(model_type: str, folder: Path, **fields: Any) -> Any:
    CONFIG_MAPPING[model_type](**fields).save_pretrained(folder)
    return describe_model(folder)


@pytest.mark.parametrize(
    ("model_type", "adapted"),
    [
        ("llama", 7 * 32),
        ("gpt2", 4 * 12),  # Conv1D
        ("mixtral", 4 * 32),  # experts in stacked parameters
        ("mamba2", 64),  # in_proj alone is called; its file has an infinity in it, in transformers' spelling
        ("falcon_h1", None),  # likewise
        ("bert", 6 * 12 + 1),
        ("t5", None),
        ("whisper", None),
        ("vit", None),
        ("llava", None),
        ("qwen2_5_omni", None),  # no AutoModelForCausalLM, no AutoModel
        ("gemma4", None),  # heads differ from layer to layer
        ("donut-swin", None),  # a list of numbers of heads
        ("musicgen", None),  # two text configs
        ("reformer", None),  # the model for AutoModelForCausalLM refuses its own default config
    ],
)
def test_plans_for_many_kinds(model_type: str, adapted: int | None, tmp_path: Path) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    shape = described(model_type, tmp_path)
    assert shape.num_adapted == adapted or (adapted is None and shape.num_adapted > 0)
    assert shape.base_parameters > 0
    assert make_plan(shape, WORK, hardware("h200")).best.time.total > 0


@given(model_type=st.sampled_from(sorted(CONFIG_MAPPING)))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_kind_is_described_or_refused_in_one_line(
    model_type: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Drawn from all of transformers' kinds; each was walked once (docs/scaling.md)."""
    folder = tmp_path_factory.mktemp("config")
    try:
        CONFIG_MAPPING[model_type]().save_pretrained(folder)
    except Exception:
        return  # transformers cannot make this config without arguments
    refusal = ""
    try:
        assert describe_model(folder).num_adapted > 0
    except ValueError as error:
        refusal = str(error)
    assert len(refusal) < 700
    assert not refusal or str(folder) in refusal or "target_modules" in refusal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not the config"),
        ("[]", "is not the config"),
        ('{"model_type": "abacus"}', "knows no model_type 'abacus'"),
        ('{"model_type": ["llama"]}', "is not the config"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "num_hidden_layers=1000000000 is more than 10000"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is not the config"),
        ('{"model_type": "resnet"}', "says nothing of hidden_size"),
        ('{"model_type": "dbrx", "attn_config": {"clip_qkv": null}}', "no model can be built|is not the config"),
    ],
)
def test_configs_that_cannot_be_planned(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        describe_model(tmp_path)
    assert "\n" not in str(error.value)


def test_architectures_name_models_only(tmp_path: Path) -> None:
    """Whatever a file names there, only classes of models are called."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"model_type": "llama", "architectures": ["set_seed", "pipeline", 3], **small}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert describe_model(tmp_path).num_adapted == 7


def test_sizes_of_a_layer_may_be_tensors() -> None:
    """As in transformers' Inkling."""
    layer = nn.Linear(3, 4)
    layer.in_features = torch.tensor(3)
    assert in_out_features(layer) == (3, 4)
    assert in_out_features(nn.LayerNorm(3)) is None
