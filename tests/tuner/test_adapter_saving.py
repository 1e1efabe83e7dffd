"""Saving and loading: names in the file, bit-equal reload, and files that do not fit."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..support.adapter_support import adapted, assert_same, batch, bert, config, gpt2, llama, train_step


def weights(model):
    return {n: p for n, p in model.named_parameters() if ".moelora_experts." in n or ".modules_to_save." in n}


@pytest.fixture
def saved(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_names_in_the_file(saved):
    model, path = saved
    names = set(load_file(path / "adapter_model.safetensors"))
    assert len(names) == 3 * 6
    layer = "base_model.model.model.layers.0.self_attn.q_proj.moelora_experts."
    assert {layer + "lora_A", layer + "lora_B", layer + "router.weight"} < names
    assert names == {name.replace(".default", "") for name in weights(model)}
    assert json.loads((path / "adapter_config.json").read_text())["peft_type"].startswith("MOELORA ")


@pytest.mark.parametrize("builder", [llama, gpt2, bert])
@pytest.mark.parametrize(("low_cpu_mem_usage", "is_trainable"), [(False, True), (True, False), (True, True)])
def test_reload_is_bit_equal(builder, low_cpu_mem_usage, is_trainable, tmp_path):
    model, inputs = adapted(builder), batch(builder)
    train_step(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(
        builder(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert_same(weights(loaded), weights(model))
    assert all(p.requires_grad == is_trainable for p in weights(loaded).values())
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    if is_trainable:
        assert_same(train_step(loaded, inputs)[1], train_step(model, inputs)[1])


def test_several_adapters_are_saved_apart(tmp_path):
    model, inputs = adapted(), batch()
    model.add_adapter("other", config(num_experts=3))
    model.add_adapter("moe", config(num_experts=2))
    model.save_pretrained(tmp_path)
    for name, path in (("default", tmp_path), ("other", tmp_path / "other"), ("moe", tmp_path / "moe")):
        loaded = PeftModel.from_pretrained(llama(), path)  # as "default"
        model.set_adapter(name)
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
        model.load_adapter(path, "copy_of_" + name)
        model.set_adapter("copy_of_" + name)
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("name", ["router", "lora_A", "weight", "self_attn", "q_proj"])
def test_adapter_names_that_are_parts_of_keys_are_refused(name):
    model = adapted()
    with pytest.raises(ValueError, match=f"adapter_name='{name}' is also the name of a module or parameter"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def change(path, edit):
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


KEY = "base_model.model.model.layers.1.self_attn.v_proj.moelora_experts."


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_that_do_not_fit_are_refused_by_name(saved, low_cpu_mem_usage):
    _, path = saved

    def load():
        PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=low_cpu_mem_usage)

    change(path, lambda t: t.pop(KEY + "lora_B"))
    with pytest.raises(ValueError, match=r"Missing \(1\): .*layers.1.self_attn.v_proj.moelora_experts.default.lora_B"):
        load()
    change(path, lambda t: t.update({KEY + "lora_B": torch.zeros(4, 16, 2), KEY + "lora_C": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"Unexpected \(1\): .*v_proj.moelora_experts.lora_C"):
        load()
    change(path, lambda t: (t.pop(KEY + "lora_C"), t.update({KEY + "lora_B": torch.zeros(4, 16, 3)})))
    with pytest.raises(RuntimeError, match=r"v_proj.moelora_experts.default.lora_B"):
        load()
    change(path, lambda t: t.clear())
    with pytest.raises(ValueError, match=r"Missing \(18\)"):
        load()


def test_state_dict_functions_round_trip():
    model, other = adapted(), adapted()
    for p in weights(other).values():
        p.data.zero_()
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert_same(weights(other), weights(model))


def test_saving_partitioned_weights_warns():
    model = adapted()
    state = {name: torch.empty(0) for name in model.state_dict()}
    with pytest.warns(UserWarning, match=r"18 adapter weights to be saved are empty.*ZeRO-3"):
        peft.get_peft_model_state_dict(model, state_dict=state)
