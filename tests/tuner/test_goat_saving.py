"""Adapters that start from singular values, in one process: saving, loading, conversion, the cache."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import ds_moelora
from ds_moelora.tuner.start import svd_init
from ds_moelora.tuner.start.base_weight import same_weight, weight_hash

from ..support.adapter_support import adapted, batch, gpt2, llama
from ..support.goat import GOAT, largest, layers, logits, train


def refuse(*args):
    raise AssertionError("decomposed a weight")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("builder", [llama, gpt2])
def test_reload_on_the_original_base(builder, low_cpu_mem_usage, tmp_path, monkeypatch, report):
    inputs = batch(builder)
    model = train(adapted(builder, **GOAT), inputs)
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    size = sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size < 2 * trained + 64 * len(layers(model))

    monkeypatch.setattr(svd_init, "singular_triplets", refuse)  # loading decomposes nothing
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(
            builder(), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        found = largest(logits(loaded, inputs), wanted)
        report("GOAT: reload on the original base (deviation of the logits)", f"{builder.__name__}: {found:.1e}")
        assert found < 1e-5
    a, b = train(loaded, inputs), train(model, inputs)
    assert largest(logits(a, inputs), logits(b, inputs)) < 1e-5
    loaded.load_adapter(tmp_path, "default", is_trainable=True)  # as a Trainer resumes
    assert largest(logits(loaded, inputs), wanted) < 1e-5


def test_other_starting_factors_replace_those_in_place(tmp_path):
    """A checkpoint made with another rho, loaded into an adapter that has folded its own start."""
    inputs = batch()
    saved = train(adapted(rho=3.0, **GOAT), inputs)
    saved.save_pretrained(tmp_path)
    model = adapted(rho=10.0, **GOAT)
    model.load_adapter(tmp_path, "default")
    assert largest(logits(model, inputs), logits(saved, inputs)) < 1e-5


def test_a_wrong_base_is_named(tmp_path):
    adapted(**GOAT).save_pretrained(tmp_path)
    wrong = llama()
    with torch.no_grad():
        wrong.model.layers[1].self_attn.v_proj.weight[0, 0] += 1e-6
        wrong.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    before = wrong.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: the base weight is not the one"):
        PeftModel.from_pretrained(wrong, tmp_path)
    assert torch.equal(wrong.model.layers[0].self_attn.q_proj.base_layer.weight, before)
    PeftModel.from_pretrained(llama().bfloat16(), tmp_path)  # the same weights, rounded


def test_hashes_compare_in_the_coarser_dtype():
    W = torch.randn(3, 5)
    half = W.to(torch.bfloat16)
    assert weight_hash(W).shape == (2, 32)
    assert same_weight(weight_hash(W), weight_hash(half))
    assert same_weight(weight_hash(half), weight_hash(half.float()))
    assert not same_weight(weight_hash(W), weight_hash(half.float() * 1.01))
    assert not same_weight(weight_hash(W), weight_hash(W + 1e-6))


@pytest.mark.parametrize(
    "fields", [GOAT, {"init_lora_weights": "milora"}, {"init_lora_weights": "pissa", "scaling": "rslora"}]
)
def test_conversion_to_a_plain_mixture(fields, tmp_path, report):
    inputs = batch()
    model = train(adapted(**fields), inputs)
    ds_moelora.save_without_residual(model, str(tmp_path))
    plain = PeftModel.from_pretrained(llama(), tmp_path)
    assert plain.peft_config["default"].r == 2 * (1 + 4)
    assert plain.peft_config["default"].init_lora_weights is True
    assert not any("initial" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    found = largest(logits(plain, inputs), logits(model, inputs))
    title = "GOAT: conversion to a plain mixture (deviation of the logits)"
    report(title, f"{fields['init_lora_weights']}: {found:.1e}")
    assert found < 1e-5
    with pytest.raises(ValueError, match="did not start from singular values"):
        ds_moelora.save_without_residual(adapted(), str(tmp_path))


# The cache


def test_cached_decompositions_are_used_and_depend_on_the_weight(tmp_path, monkeypatch):
    fields = {**GOAT, "svd_cache_dir": str(tmp_path / "cache")}
    first = adapted(**fields)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == len(layers(first))
    assert all(path.suffix == ".safetensors" for path in files)
    other = adapted(rho=3.0, **fields)  # computed from the same triplets
    assert sorted((tmp_path / "cache").iterdir()) == files
    again, original = adapted(**fields), svd_init.singular_triplets
    monkeypatch.setattr(svd_init, "singular_triplets", refuse)
    again = adapted(**fields)
    for a, b, c in zip(layers(first), layers(again), layers(other), strict=True):
        assert torch.equal(a.experts("default").lora_A, b.experts("default").lora_A)
        assert not torch.equal(a.experts("default").lora_A, c.experts("default").lora_A)
    monkeypatch.setattr(svd_init, "singular_triplets", original)
    adapted(init_lora_weights="goat_mini", svd_cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2 * len(files)
    save_file({"U": torch.zeros(1)}, files[0])
    with pytest.raises(ValueError, match=r"svd_cache_dir: .*\.safetensors cannot be read .*delete it"):
        adapted(**fields)
    assert not any("svd_cache_dir" in (tmp_path / name).read_text() for name in _saved_config(first, tmp_path))


def _saved_config(model, path):
    model.save_pretrained(path)
    return ["adapter_config.json"]
