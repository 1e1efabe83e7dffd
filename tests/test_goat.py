"""Adapters that start from singular values, in one process: the start, the residual, saving, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ds_moelora
from ds_moelora import MoELoRAConfig
from ds_moelora.adapters import svd_init
from ds_moelora.adapters.base_weight import read_weight, same_weight, weight_hash
from ds_moelora.core.goat import VARIANTS, mean_product, triplet_indices

from .adapter_support import VOCAB, adapted, batch, config, gpt2, llama, train_step
from .support.goat import base, goat_model, layers

REPOSITORY = Path(__file__).parent.parent
GOAT = {"init_lora_weights": "goat", "scaling": "goat"}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def largest(a, b):
    return (a - b).abs().max().item()


def train(model, inputs, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        train_step(model, inputs)
        optimizer.step()
    return model


def refuse(*args):
    raise AssertionError("decomposed a weight")


# The start


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("builder", [llama, gpt2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_base_weight_plus_mean_of_experts_is_the_original(builder, variant, dtype, report):
    """W + (s / E) sum_i B_i A_i = W0 up to one rounding of W; A and B follow the formula; Conv1D is transposed."""
    original = {name: m.weight.data.clone() for name, m in builder().to(dtype).named_modules() if hasattr(m, "weight")}
    model = adapted(builder, dtype, init_lora_weights=variant, scaling="goat", eta=2.0, rho=5.0)
    worst = 0.0
    for layer in layers(model):
        experts = layer.experts("default")
        W0 = original[experts.pair.name].double()
        W0 = W0.T if builder is gpt2 else W0
        A, B = (f.detach().double() for f in experts.factors())
        assert experts.scaling == pytest.approx((3 * 2.0 * layer.in_features / 2) ** 0.5)
        restored = read_weight(layer.base_layer).double() + mean_product(A, B, experts.scaling)
        worst = max(worst, largest(restored, W0) / W0.abs().max().item())
        U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
        for i, mine in enumerate(triplet_indices(len(S), 4, 2, variant)):
            wanted = (U[:, mine] * S[mine]) @ Vh[mine] / 5.0
            torch.testing.assert_close(experts.scaling * B[i] @ A[i].T, wanted, rtol=0, atol=BOUND[dtype] * S[0].item())
    title = "GOAT: base weight + mean of experts, from W0 (relative to its largest entry)"
    report(title, f"{builder.__name__} {variant:9s} {dtype}: {worst:.1e}")
    assert worst < BOUND[dtype]


# One rounding of the weight to its own dtype; bfloat16 has 8 bits.
BOUND = {torch.float64: 1e-9, torch.float32: 3e-7, torch.bfloat16: 2**-8}


def test_expectation_at_the_start_is_the_base_model():
    """With gates 1/E (top_k = E, a router of zeros) the layer equals the base layer; with top_k = 1, on average."""
    plain = base()
    model = goat_model(top_k=3)
    x = torch.randn(5, 7)
    for layer, original in zip(layers(model), (plain.first, plain.second), strict=True):
        experts = layer.experts("default")
        experts.router.weight.data.zero_()
        x = x if x.shape[1] == layer.in_features else torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer(x), original(x), rtol=0, atol=1e-6)
        experts.top_k, total = 1, 0
        for i in range(3):
            experts.router.weight.data.zero_()[i] = 100 * x[0]
            total = total + layer(x[:1]) / 3
        torch.testing.assert_close(total, original(x[:1]), rtol=0, atol=1e-6)


def test_an_optimizer_sees_nothing_but_the_trained_factors():
    model = adapted(**GOAT)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 6 * 3
    assert not any("initial" in name for name in names)
    ds_moelora.GateRiemannianSGD([p for p in model.parameters() if p.requires_grad], lr=1.0, include_scaling=True)


# The residual


@pytest.mark.parametrize("builder", [llama, gpt2])
def test_disabled_and_removed_adapters_leave_the_original_model(builder, report):
    inputs = batch(builder)
    wanted = logits(builder(), inputs)
    model = train(adapted(builder, **GOAT), inputs)
    assert largest(logits(model, inputs), wanted) > 1e-3
    with model.disable_adapter():
        disabled = largest(logits(model, inputs), wanted)
    unloaded = largest(logits(model.unload(), inputs), wanted)
    line = f"{builder.__name__}: disabled {disabled:.1e}, unloaded {unloaded:.1e}"
    report("GOAT: deviation from the original model's logits", line)
    assert max(disabled, unloaded) < 1e-5


def test_several_adapters_on_one_layer(tmp_path):
    """The second finds the original weight, too; each does what it does alone; deleting gives everything back."""
    inputs = batch()
    alone = train(adapted(init_lora_weights="pissa"), inputs)
    alone.save_pretrained(tmp_path)
    wanted, original = logits(alone, inputs), logits(llama(), inputs)
    model = train(adapted(**GOAT), inputs)
    first = logits(model, inputs)
    model.add_adapter("fresh", config(init_lora_weights="pissa"))
    model.load_adapter(tmp_path, "loaded")
    for found, reference in zip(layers(model), layers(adapted(init_lora_weights="pissa")), strict=True):
        torch.testing.assert_close(
            found.experts("fresh").lora_A, reference.experts("default").lora_A, rtol=0, atol=1e-5
        )
    assert largest(logits(model, inputs), first) == 0
    model.set_adapter("loaded")
    assert largest(logits(model, inputs), wanted) < 1e-5
    model.delete_adapter("default")
    assert largest(logits(model, inputs), wanted) < 1e-5
    model.base_model.set_adapter(["loaded", "fresh"])
    model.delete_adapter("loaded")
    model.delete_adapter("fresh")
    assert largest(logits(model.base_model.model, inputs), original) < 1e-5


@pytest.mark.parametrize("folded", [True, False])
def test_one_expert_merges_exactly(folded):
    inputs = batch()
    model = adapted(num_experts=1, top_k=1, init_lora_weights="pissa")
    if not folded:
        model.add_adapter("second", config(num_experts=1, top_k=1, init_lora_weights="milora"))
        model.set_adapter("second")
    train(model, inputs)
    wanted = logits(model, inputs)
    model.merge_adapter()
    assert largest(logits(model, inputs), wanted) < 1e-5
    model.unmerge_adapter()
    assert largest(logits(model, inputs), wanted) < 1e-5
    assert largest(logits(model.merge_and_unload(), inputs), wanted) < 1e-5


# Saving


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


def test_reload_in_a_process_without_deepspeed(tmp_path):
    model = train(adapted(**GOAT), batch())
    model.save_pretrained(tmp_path)
    torch.save(logits(model, batch()), tmp_path / "logits.pt")
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'deepspeed' else find(name, *a)\n"
        "import ds_moelora, torch\n"
        "from peft import PeftModel\n"
        "from tests.adapter_support import llama, batch\n"
        "model = PeftModel.from_pretrained(llama(), sys.argv[1])\n"
        "found = model(**batch()).logits\n"
        "print((found - torch.load(sys.argv[1] + '/logits.pt')).abs().max().item() < 1e-5)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.stdout.strip().endswith("True"), done.stderr


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


# Bases that are not plain matrices


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


# What is refused


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "all-linear", r".*(lm_head|v_proj)"])
def test_tied_weights_are_refused_before_anything_is_changed(targets):
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    fields = config(target_modules=targets, init_lora_weights="goat")
    if targets == "all-linear":  # PEFT leaves the output head out
        get_peft_model(model, fields)
        return
    with pytest.raises(ValueError, match=r"lm_head\.weight is the same parameter as model\.embed_tokens\.weight"):
        get_peft_model(model, fields)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_too_large_a_rank_names_the_layer_and_the_largest():
    with pytest.raises(ValueError, match=r"v_proj: r=5 with num_experts=4 does not fit .* 16 x 32.*Use r <= 4"):
        adapted(r=5, **GOAT)
    with pytest.raises(ValueError, match=r"Use at most 16 experts"):
        adapted(r=1, num_experts=17, **GOAT)


def test_a_weight_in_an_unknown_form_is_refused():
    class Packed(nn.Module):
        in_features, out_features = 32, 32

        def __init__(self):
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)

    model = llama()
    model.model.layers[0].self_attn.q_proj = Packed()
    with pytest.raises(ValueError, match=r"q_proj \(Packed\) stores its weight in a form"):
        get_peft_model(model, config(**GOAT))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "goat_max"}, r"init_lora_weights='goat_max' is unknown; use True.*'milora'"),
        ({"rho": 5.0}, r"rho=5.0 has no effect without init_lora_weights='goat'"),
        ({"svd_cache_dir": "x"}, r"svd_cache_dir='x' has no effect without init_lora_weights='goat'"),
        ({"eta": 2.0}, r"eta=2.0 has no effect without scaling='goat'"),
        ({"scaling": "goat", "lora_alpha": 32}, r"lora_alpha=32 has no effect without scaling='alpha' or 'rslora'"),
        ({"rho": 0.0, **GOAT}, r"rho=0.0 must be a number > 0"),
        ({"eta": float("nan"), **GOAT}, r"eta=nan must be a number > 0"),
    ],
)
def test_settings_out_of_range_or_without_effect(fields, message):
    with pytest.raises(ValueError, match=message):
        MoELoRAConfig(**fields)
