"""The tags that pair parameters, after everything that may replace a parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ds_moelora import tag_lora_pairs
from ds_moelora.tuner import MoELoRALayer

from ..support.adapter_support import adapted, config, llama


def check_tags(model, adapter="default"):
    """Every pair of the adapter is tagged, by the object that its layer's backward pass reads."""
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, MoELoRALayer) and adapter in module.moelora_experts:
            experts = module.experts(adapter)
            A, B, router = experts.lora_A, experts.lora_B, experts.router.weight
            pair = A.lora_pair
            assert pair is B.lora_pair is router.lora_pair is experts.pair
            assert (A.lora_role, B.lora_role, router.lora_role) == ("A", "B", "router")
            assert (pair.num_experts, pair.rank, pair.scaling) == (A.shape[0], A.shape[2], experts.scaling)
            assert pair.gate is not None
            assert not pair.rank_first_A
            assert pair.name
            assert name.endswith(pair.name)
            count += 1
    assert count
    gates = {id(m.pair.gate) for m in model.modules() if hasattr(m, "pair")}
    assert len(gates) >= count
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_after_get_peft_model(dtype, autocast):
    assert check_tags(get_peft_model(llama().to(dtype), config(), autocast_adapter_dtype=autocast)) == 6


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_loading(tmp_path, low_cpu_mem_usage, dtype):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(
        llama().to(dtype), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    check_tags(model)
    model.load_adapter(tmp_path, "second", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    check_tags(model, "second")
    model.set_adapter("second")
    check_tags(model, "second")
    check_tags(model, "default")


CHANGES = {
    "to dtype": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "to meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "assigned state": lambda m: (m.load_state_dict(m.state_dict(), assign=True), m)[1],
    "disabled and enabled": lambda m: (m.base_model.disable_adapter_layers(), m.base_model.enable_adapter_layers(), m)[
        2
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_after(change):
    model = CHANGES[change](adapted())
    check_tags(model)


def test_a_copy_has_pairs_and_settings_of_its_own():
    model = adapted()
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, MoELoRALayer):
            m.experts("default").pair.gate.gate_scaling = "full"
    assert all(
        m.experts("default").lora_A.lora_pair.gate.gate_scaling == "none"
        for m in model.modules()
        if isinstance(m, MoELoRALayer)
    )


def test_tag_lora_pairs_counts_moe_lora_and_keeps_the_objects():
    model = adapted()
    before = [m.pair for m in model.modules() if hasattr(m, "pair")]
    assert tag_lora_pairs(model) == 6
    assert [m.pair for m in model.modules() if hasattr(m, "pair")] == before
    check_tags(model)
    model.add_adapter("other", config(target_modules=["k_proj"]))
    assert tag_lora_pairs(model) == 8


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_plain_lora(fields):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **fields))
    assert tag_lora_pairs(model) == 4
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    pair = A.lora_pair
    assert pair is B.lora_pair
    assert (pair.num_experts, pair.rank, pair.rank_first_A, pair.gate) == (1, 3, True, None)
    assert pair.scaling == layer.scaling["default"]
    assert pair.name == "base_model.model.model.layers.0.self_attn.q_proj"
    tagged = sum(hasattr(p, "lora_pair") for p in model.parameters())
    assert tagged == 8  # no magnitude vector, no bias
    tag_lora_pairs(model)
    assert A.lora_pair is pair


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.lin = nn.Embedding(9, 4), nn.Conv2d(4, 6, 3), nn.Linear(6, 2)


def test_convolutions_are_pairs_and_embeddings_are_named_and_left_alone():
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["embedding", "conv", "lin"]))
    with pytest.warns(UserWarning, match=r"left 1 LoRA layers without a tag.*base_model.model.embedding \(Embedding"):
        assert tag_lora_pairs(model) == 2
    conv = model.base_model.model.conv
    assert conv.lora_A["default"].weight.lora_pair is conv.lora_B["default"].weight.lora_pair
    assert tuple(conv.lora_A["default"].weight.shape) == (2, 4, 3, 3)
    assert not hasattr(model.base_model.model.embedding.lora_embedding_A["default"], "lora_pair")


def test_no_pairs_is_an_error_that_says_what_to_call():
    with pytest.raises(ValueError, match=r"Linear has no LoRA pair to tag. Call get_peft_model"):
        tag_lora_pairs(nn.Linear(2, 2))
