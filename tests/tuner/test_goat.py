"""Adapters that start from singular values, in one process: the start, the residual, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import ds_moelora
from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.goat import VARIANTS, mean_product, triplet_indices
from ds_moelora.tuner.start.base_weight import read_weight

from ..support.adapter_support import adapted, batch, config, gpt2, llama
from ..support.goat import GOAT, base, goat_model, largest, layers, logits, train

# The start


@pytest.mark.parametrize(("builder", "dtype"), [(llama, torch.float64), (gpt2, torch.float32), (llama, torch.bfloat16)])
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
        experts.rule, total = experts.rule._replace(top_k=1), 0
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
        ({"init_lora_weights": "goat_max"}, r"init_lora_weights='goat_max' is unknown; use True.*milora"),
        ({"rho": 5.0}, r"rho=5.0 has no effect without init_lora_weights='goat'"),
        ({"svd_cache_dir": "x"}, r"svd_cache_dir='x' has no effect without init_lora_weights='goat'"),
        ({"eta": 2.0}, r"eta=2.0 has no effect without scaling='goat'"),
        ({"scaling": "goat", "lora_alpha": 32}, r"lora_alpha=32 has no effect without scaling='alpha' or 'rslora'"),
        ({"eta": float("nan"), **GOAT}, r"eta=nan must be a number > 0"),
    ],
)
def test_settings_out_of_range_or_without_effect(fields, message):
    with pytest.raises(ValueError, match=message):
        MoELoRAConfig(**fields)
