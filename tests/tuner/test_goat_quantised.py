"""Adapters that start from singular values, in one process: bases whose weights are no plain matrices."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ds_moelora.mixture.goat import triplet_indices
from ds_moelora.tuner.start.base_weight import read_weight

from ..support.adapter_support import VOCAB, batch, config, llama
from ..support.goat import GOAT, largest, layers, logits, train


class Int8Linear(nn.Module):
    """A quantised layer as a third party might write it: whole numbers, one scale per row, `dequantize()`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def dequantize(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


def quantised(wrap):
    """A Llama of width 64 (a block of bitsandbytes' 4 bit) with quantised layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, **sizes))
    for layer in model.model.layers:
        layer.self_attn.q_proj = wrap(layer.self_attn.q_proj)
        layer.mlp.down_proj = wrap(layer.mlp.down_proj)
    return model


def check_quantised(wrap, tmp_path):
    """The residual stays beside the weight: nothing is quantised again, and the start is exact."""
    inputs, targets = batch(), ["q_proj", "down_proj"]
    original = logits(quantised(wrap), inputs)
    model = get_peft_model(quantised(wrap), config(target_modules=targets, **GOAT), autocast_adapter_dtype=False)
    assert [layer.experts("default").residual.folded for layer in layers(model)] == [False] * 4
    experts = layers(model)[0].experts("default")
    W0, x = read_weight(layers(model)[0].base_layer).double(), torch.randn(3, layers(model)[0].in_features)
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    indices = triplet_indices(len(S), 4, 2, "goat")
    mean = sum((U[:, i] * S[i]) @ Vh[i] for i in indices) / 10 / 4
    found = experts.add_mean(x, torch.zeros(3, len(W0)), 1.0).double()
    torch.testing.assert_close(found, x.double() @ mean.T, rtol=0, atol=1e-5)
    train(model, inputs)
    assert all(b.grad is not None for b in experts.factors())
    wanted = logits(model, inputs)
    with model.disable_adapter():
        assert largest(logits(model, inputs), original) < 1e-6
    model.save_pretrained(tmp_path)
    assert largest(logits(PeftModel.from_pretrained(quantised(wrap), tmp_path), inputs), wanted) < 1e-5
    untouched = quantised(wrap).state_dict()
    for name, values in model.unload().state_dict().items():
        if name.endswith(".weight"):  # not bitsandbytes' scales, which its own inference on a CPU rounds
            assert torch.equal(values, untouched[name]), name


def test_quantised_bases(tmp_path):
    check_quantised(Int8Linear, tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def wrap(linear):
        if bits == 4:
            made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
            made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return made.to("cpu")

    check_quantised(wrap, tmp_path)
    used = wrap(nn.Linear(64, 64)).eval()
    used(torch.randn(3, 64))
    if getattr(getattr(used.weight, "quant_state", None), "packing_format_for_cpu", False):
        with pytest.raises(ValueError, match="has repacked this 4-bit weight"):
            read_weight(used)


def test_meta_device():
    """Nothing is computed without weights; the adapter is refused when used, and works once it is loaded."""
    with torch.device("meta"):
        model = get_peft_model(llama(), config(**GOAT))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    empty_adapter = get_peft_model(llama(), config(**GOAT), low_cpu_mem_usage=True)
    for without in (model, empty_adapter):
        with pytest.raises(ValueError, match=r"q_proj: adapter 'default' starts from .*meta device"):
            without(**batch())
