"""Temperature, jitter, top-p and patterns of single layers in adapted models: formulas, refusals, saving."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by, route
from ds_moelora.tuner import MoELoRALayer

from ..support.adapter_support import adapted, assert_same, batch, config, gradients, llama, train_step, wrap

EVERYTHING = {
    "router_z_loss_coef": 1e-2,
    "router_temperature": 1.5,
    "router_jitter": 0.1,
    "top_p": 0.7,
    "shared_expert": True,
    "rank_pattern": {"v_proj": 3},
    "alpha_pattern": {"v_proj": 8},
    "num_experts_pattern": {"down_proj": 5, r".*layers\.0\..*": 2},
    "top_k_pattern": {"down_proj": 4},
}


def layers_of(model):
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if type(m) is MoELoRALayer}


# Temperature and jitter


@given(
    sizes=st.tuples(st.integers(0, 7), *[st.integers(1, 7)] * 3, st.integers(1, 7), st.integers(1, 3)),
    temperature=st.floats(0.1, 10),
    top_p=st.sampled_from([None, 0.3, 0.9]),
    shared=st.tuples(st.booleans(), st.booleans()),
    compute=st.sampled_from(["dense", "grouped"]),
)
@settings(max_examples=40, deadline=None)
def test_a_layer_with_any_options_is_the_formula(sizes, temperature, top_p, shared, compute):
    """Output and every gradient in float64, against autograd of the formula expert by expert."""
    T, I, O, E, k, r = sizes
    options = {"router_temperature": temperature, "top_p": top_p, "expert_compute": compute}
    options |= {"shared_A": shared[0], "shared_expert": shared[1]}
    base = nn.Linear(I, O).double()
    model = wrap(copy.deepcopy(base), r=r, num_experts=E, top_k=min(k, E), **options)
    e = layers_of(model)["lin"].experts("default")
    x = torch.randn(T, I, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    params = list(e.parameters())
    twins = dict(zip((n for n, _ in e.named_parameters()), [p.detach().clone() for p in params], strict=True))
    for twin in twins.values():
        twin.requires_grad_()
    chosen = chosen_by(route(z @ twins["router.weight"].t() / temperature, min(k, E), top_p))
    factors = (twins["lora_A"], twins["lora_B"], twins["router.weight"])
    expected = reference_layer(z, base(z), *factors, k, e.scaling, chosen=chosen, temperature=temperature)
    if shared[1]:
        expected = expected + e.scaling * z @ twins["shared.lora_A"][0] @ twins["shared.lora_B"][0].t()
    y = model.eval()(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert max_relative_error(y, expected) < 1e-10
    assert max_relative_error(x.grad, z.grad) < 1e-10
    for (name, twin), p in zip(twins.items(), params, strict=True):
        if name != "router.weight" or (E > 1 and twin.grad.abs().max() > 1e-6):
            assert max_relative_error(p.grad, twin.grad) < 1e-8, name


def test_jitter_is_noise_on_the_routers_input_in_training_alone():
    eps, base = 0.3, nn.Linear(6, 5).double()
    model, plain = wrap(copy.deepcopy(base), router_jitter=eps), wrap(copy.deepcopy(base))
    e = layers_of(model)["lin"].experts("default")
    x = torch.randn(50, 6, dtype=torch.float64)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    model.train()
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(1 - eps, 1 + eps)
    gates = route((x * noise) @ e.router.weight.t(), 2)
    experts = torch.einsum("ti,eir,eor,te->to", x, e.lora_A, e.lora_B, gates)  # these see x without noise
    torch.testing.assert_close(y, base(x) + e.scaling * experts)
    assert not torch.equal(model(x), y)


@pytest.mark.parametrize("fields", [{"router_jitter": 0.2}, {**EVERYTHING, "lora_dropout": 0.1}])
def test_checkpointing_repeats_the_same_noise(fields):
    """The recomputed forward pass draws what the first one drew: equal loss and gradients."""
    results = []
    for checkpointing in (False, True):
        model = adapted(**fields)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        results.append(train_step(model, batch()))
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[1][1], results[0][1], rtol=1e-6)
    assert not torch.equal(train_step(adapted(**fields), batch())[0], results[0][0])


# Patterns of single layers


NAMES = [f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


@given(
    st.dictionaries(
        st.sampled_from(
            ["q_proj", "self_attn.q_proj", r"layers\.1\..*", "v_proj|q_proj", "down_proj", ".*", "model.layers.0.*"]
        ),
        st.integers(1, 5),
        max_size=3,
    )
)
@settings(max_examples=25, deadline=None)
def test_patterns_mean_what_pefts_rank_pattern_means(pattern):
    targets = ["q_proj", "v_proj", "down_proj"]
    names = [f"model.{name}" for name in NAMES]
    firsts = {next((k for k in pattern if re.match(rf"(.*\.)?({k})$", name)), None) for name in names}
    if set(pattern) - firsts:
        with pytest.raises(ValueError, match="or an earlier key fits first"):
            get_peft_model(llama(), MoELoRAConfig(r=6, target_modules=targets, rank_pattern=pattern))
        pattern = {key: value for key, value in pattern.items() if key in firsts}
    peft = get_peft_model(llama(), LoraConfig(r=6, target_modules=targets, rank_pattern=pattern))
    ours = get_peft_model(llama(), MoELoRAConfig(r=6, target_modules=targets, rank_pattern=pattern))
    layers = layers_of(ours)
    assert len(layers) == len(NAMES)
    for name, layer in layers.items():
        assert layer.experts("default").rank == peft.base_model.model.get_submodule(name).r["default"], name
        assert layer.experts("default").scaling == 16 / layer.experts("default").rank


def test_every_pattern_reaches_its_layers():
    layers = {name.removeprefix("model."): m.experts("default") for name, m in layers_of(adapted(**EVERYTHING)).items()}
    found = {name: (e.num_experts, e.top_k, e.rank, e.scaling) for name, e in layers.items()}
    assert found == {
        "layers.0.self_attn.q_proj": (2, 2, 2, 8.0),
        "layers.0.self_attn.v_proj": (2, 2, 3, 8 / 3),
        "layers.0.mlp.down_proj": (5, 4, 2, 8.0),
        "layers.1.self_attn.q_proj": (4, 2, 2, 8.0),
        "layers.1.self_attn.v_proj": (4, 2, 3, 8 / 3),
        "layers.1.mlp.down_proj": (5, 4, 2, 8.0),
    }
    for e in layers.values():
        assert e.lora_A.shape[0::2] == (e.num_experts, e.rank)
        assert e.lora_B.shape[0::2] == (e.num_experts, e.rank)
        assert e.router.weight.shape[0] == e.num_experts
        assert e.shared.lora_A.shape[2] == e.rank


def test_molas_lists():
    """MoLA-2468 on a model of 4 layers, as docs/routing.md writes it: one number of experts per layer."""
    experts = (2, 4, 6, 8)
    by_layer = {rf"layers\.{i}\..*": experts[i * len(experts) // 4] for i in range(4)}
    model = get_peft_model(llama(layers=4), config(num_experts_pattern=by_layer))
    for name, layer in layers_of(model).items():
        assert layer.experts("default").num_experts == experts[int(name.split(".")[2])]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"q_pro": 3}}, r"rank_pattern: \['q_pro'\] fit none of the 6 adapted modules.*q_proj"),
        ({"top_k_pattern": {"k_proj": 1, "q_proj": 1}}, r"top_k_pattern: \['k_proj'\] fit none"),
        ({"num_experts_pattern": {r"layers\.2\..*": 2}}, r"num_experts_pattern: .*layers"),
        ({"num_experts_pattern": {"v_proj": 1}}, r"layers\.0\.self_attn\.v_proj: top_k=2 is larger than num_experts=1"),
        ({"top_k_pattern": {"v_proj": 9}}, r"layers\.0\.self_attn\.v_proj: top_k=9 is larger than num_experts=4"),
        ({"num_experts_pattern": {"v_proj": 3}, "ep_size": 2}, r"v_proj: ep_size=2 must divide num_experts; .*=3"),
    ],
)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], r".*\.(q_proj|v_proj|down_proj)"])
def test_patterns_that_do_not_fit_are_refused_before_anything_changes(fields, message, targets):
    model = llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(target_modules=targets, **fields))
    assert not layers_of(model)


def test_patterns_with_all_linear():
    model = get_peft_model(llama(), config(target_modules="all-linear", rank_pattern={"o_proj": 7}))
    assert {layer.experts("default").rank for name, layer in layers_of(model).items() if "o_proj" in name} == {7}
    with pytest.raises(ValueError, match=r"\['lm_head'\] fit none of the 14 adapted modules"):
        get_peft_model(llama(), config(target_modules="all-linear", rank_pattern={"lm_head": 7}))


def test_merging_looks_at_every_layer():
    model = adapted(num_experts=1, top_k=1, num_experts_pattern={r"layers\.1\.mlp\.down_proj": 3})
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="num_experts=3: its gates depend on the token"):
            merge()
    assert not any(layer.merged for layer in layers_of(model).values())
    inputs = batch()
    model = adapted(num_experts_pattern={".*": 1}, top_k_pattern={".*": 1}, shared_expert=True).eval()
    before = model(**inputs).logits
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, before, rtol=1e-4, atol=1e-5)


# The configuration and saving


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_expert": 2}, r"shared_expert=2 must be True or False"),
        ({"shared_A": "yes"}, r"shared_A='yes' must be True or False"),
        ({"shared_A": True, "ep_size": 2}, r"shared_A=True cannot be used with ep_size=2: .*Use ep_size=1"),
        ({"rank_pattern": [1, 2]}, r"rank_pattern=\[1, 2\] must be a dict \{name or regular expression: r\}"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0 must be an integer >= 1"),
        ({"top_k_pattern": {"q": 1.5}}, r"top_k_pattern\['q'\]=1.5 must be an integer"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]=-1 must be a number > 0"),
        ({"num_experts_pattern": {"q(": 2}}, r"num_experts_pattern: 'q\(' is not a regular expression"),
        ({"num_experts_pattern": {3: 2}}, r"num_experts_pattern: 3 is not a regular expression"),
    ],
)
def test_bad_values_are_refused_with_value_bound_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        MoELoRAConfig(**fields)


def test_fields_that_are_set_later_are_checked_with_the_first_layer():
    late = config(shared_A=True)
    late.ep_size = 2
    with pytest.raises(ValueError, match=r"q_proj: shared_A=True cannot be used with ep_size=2"):
        get_peft_model(llama(), late)


@pytest.mark.parametrize("fields", [EVERYTHING, {"shared_A": True, "rank_pattern": {"q_proj": 5}}])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_is_bit_equal(fields, low_cpu_mem_usage, tmp_path):
    model, inputs = adapted(**fields), batch()
    torch.manual_seed(7)
    train_step(model, inputs)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    # Lists, since PEFT sorts the keys of what it writes, and the first expression that fits counts.
    assert {name: dict(written[name]) if "pattern" in name else written[name] for name in fields} == fields
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.peft_config["default"].to_dict() == model.peft_config["default"].to_dict() | {"inference_mode": False}
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert torch.equal(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)
    steps = []
    for m in (model, loaded):
        torch.manual_seed(8)
        steps.append(train_step(m, inputs)[1])
    assert_same(*steps)


def test_files_from_before_these_options_load(tmp_path):
    model, inputs = adapted(), batch()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for name in [*EVERYTHING, "shared_A"]:
        del written[name]
    path.write_text(json.dumps(written))
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_two_adapters_with_different_options():
    model, inputs = adapted(**EVERYTHING), batch()
    model.add_adapter("other", config(shared_A=True, num_experts_pattern={"q_proj": 3}))
    layer = next(iter(layers_of(model).values()))
    assert (layer.experts("default").num_experts, layer.experts("other").num_experts) == (2, 3)
    before = model.eval()(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, llama()(**inputs).logits)
    assert torch.equal(model(**inputs).logits, before)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    _, first = train_step(model, inputs)
    torch.manual_seed(1)
    assert_same(train_step(twin, inputs)[1], first)
    assert any(re.search(r"default\.shared\.lora_A$", name) for name in gradients(model))
