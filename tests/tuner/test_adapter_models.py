"""Adapters on tiny Llama, GPT-2, BERT and T5: everything a trainer does to a model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.reference import reference_layer
from ds_moelora.tuner import MoELoRALayer
from ds_moelora.tuner.losses import BatchLayout, auxiliary_loss, start_collecting, stop_collecting

from ..support.adapter_support import adapted, assert_same, batch, bert, config, gpt2, gradients, llama, t5, train_step

BUILDERS = [llama, gpt2, bert]


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MoELoRALayer)}


def use_reference(model):
    """Replaces the forward of every adapted layer with the slow formula, under plain autograd."""

    def slow(layer):
        def forward(x):
            flat = x.reshape(-1, x.shape[-1])
            e = layer.experts("default")
            y = reference_layer(flat, layer.base_layer(flat), e.lora_A, e.lora_B, e.router.weight, e.top_k, e.scaling)
            return y.view(*x.shape[:-1], -1)

        return forward

    for layer in layers(model).values():
        layer.forward = slow(layer)
    return model


@pytest.mark.parametrize("builder", BUILDERS)
def test_whole_model_equals_the_reference(builder):
    model = adapted(builder, torch.float64, router_aux_loss_coef=0.0)
    slow = use_reference(copy.deepcopy(model))
    inputs = batch(builder)
    loss, grads = train_step(model, inputs)
    slow_loss, slow_grads = train_step(slow, inputs)
    torch.testing.assert_close(loss, slow_loss, rtol=1e-12, atol=0)
    assert_same(grads, slow_grads, rtol=1e-9)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trainable
    assert all(".moelora_experts." in n or ".modules_to_save." in n for n in trainable)


def test_default_target_modules_are_those_of_peft_lora():
    ours = get_peft_model(llama(), MoELoRAConfig(task_type="CAUSAL_LM"))
    lora = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert ours.targeted_module_names == lora.targeted_module_names


def test_all_linear_leaves_the_head_alone():
    for builder, count in ((llama, 14), (gpt2, 8)):
        model = adapted(builder, target_modules="all-linear")
        assert len(layers(model)) == count
        assert not any("lm_head" in name for name in layers(model))


def test_target_modules_as_regular_expression_and_by_layer():
    assert len(layers(adapted(target_modules=r".*layers\.1\..*(q|k)_proj"))) == 2
    assert len(layers(adapted(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]))) == 2
    assert len(layers(adapted(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.v_proj"]))) == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_porj"], r"\['v_porj'\] not found.*Did you mean \['v_proj'\].*'q_proj'"),
        (["nothing"], r"\['nothing'\] not found"),
        (["q_proj", "embed_tokens", "norm"], r"cannot be adapted: .*embed_tokens \(Embedding\).*norm \(LlamaRMSNorm\)"),
        (r".*self_attn", r"cannot be adapted: .*self_attn \(LlamaAttention\)"),
        (r"xyz.*", r"not found in the base model. Modules that can be adapted end in"),
    ],
)
def test_bad_target_modules_are_named_and_the_model_stays_as_it_was(targets, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(target_modules=targets))
    assert not layers(model)
    get_peft_model(model, config())


def test_model_without_a_default_asks_for_target_modules():
    with pytest.raises(ValueError, match=r"no default for target_modules.*'custom'"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), MoELoRAConfig())


def test_attention_that_never_calls_its_projection_is_refused():
    with pytest.raises(ValueError, match=r"out_proj \(MultiheadAttention reads its weight"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 1)), MoELoRAConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("builder", [llama, gpt2])
def test_generate_with_cache_equals_without(builder):
    model = adapted(builder).eval()
    prompt = batch(builder, padded=False)["input_ids"][:, :5]
    cached, plain = [
        model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    ]
    assert torch.equal(cached, plain)
    with model.disable_adapter():
        base = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert not torch.equal(base, plain)


@pytest.mark.parametrize("builder", BUILDERS)
def test_disable_adapter_gives_the_base_model(builder):
    model, inputs = adapted(builder).eval(), batch(builder)
    base = builder().eval()
    if builder is bert:  # the head is new, and saved with the adapter
        base.classifier.load_state_dict(model.base_model.model.classifier.original_module.state_dict())
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert not torch.allclose(model(**inputs).logits, base(**inputs).logits)


def test_several_adapters_on_a_model():
    model, inputs = adapted(), batch()
    model.eval()
    first = model(**inputs).logits
    model.add_adapter("other", config(num_experts=3, top_k=1, target_modules=["k_proj"]))
    assert torch.equal(model(**inputs).logits, first)
    model.set_adapter("other")
    second = model(**inputs).logits
    assert not torch.allclose(first, second)
    assert all("k_proj" in name for name in train_step(model, inputs)[1])
    model.set_adapter("default")
    model.eval()
    assert torch.equal(model(**inputs).logits, first)


@pytest.mark.parametrize("builder", BUILDERS)
def test_gradient_checkpointing_gives_equal_gradients(builder):
    model, inputs = adapted(builder, router_aux_loss_coef=0.5), batch(builder)
    loss, grads = train_step(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    checked_loss, checked = train_step(model, inputs)
    assert torch.equal(loss, checked_loss)
    assert_same(checked, grads)


def test_reentrant_checkpointing_works_or_is_refused():
    model, inputs = adapted(router_aux_loss_coef=0.0), batch()
    _, grads = train_step(model, inputs)
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    model.gradient_checkpointing_enable(**reentrant)
    model.enable_input_require_grads()
    assert_same(train_step(model, inputs)[1], grads)
    model = adapted(router_aux_loss_coef=0.5)
    model.gradient_checkpointing_enable(**reentrant)
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"use_reentrant': False\}, or router_aux_loss_coef=0"):
        train_step(model, inputs)
    model.gradient_checkpointing_disable()
    train_step(model, inputs)


def test_checkpointed_layer_runs_the_same_operations_with_and_without_a_listener():
    """Forward with a collector, recomputation without: the checkpoint compares what both save."""
    layer = next(iter(layers(adapted(router_aux_loss_coef=0.5)).values())).train()
    results = []
    for checkpointed in (False, True):
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        start_collecting(layer, BatchLayout())
        out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        records = stop_collecting(layer)
        assert len(records) == 1
        layer.zero_grad()
        (out.sum() + auxiliary_loss(records)[0]).backward()
        results.append({"x": x.grad} | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
    assert_same(results[1], results[0])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 6)

    def forward(self, x):
        return CausalLMOutput(loss=self.lin(x).square().mean())


def test_compiled_model_has_equal_loss_and_gradients():
    """Between the hooks that add the losses. A compiler takes a minute for a Llama; test_base_experts.py has one."""
    torch.manual_seed(0)
    fields = config(router_aux_loss_coef=0.5, expert_compute="grouped", target_modules=["lin"], task_type=None)
    model, inputs = get_peft_model(Small(), fields), {"x": torch.randn(2, 5, 8)}
    loss, grads = train_step(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled_loss, _ = train_step(compiled, inputs)
    torch.testing.assert_close(compiled_loss, loss)
    # float32; the compiled parts of the base model round differently
    assert_same(gradients(model), grads, rtol=1e-4)
    for layer in layers(model).values():  # a setting that changes after compilation takes effect
        layer.experts("default").pair.gate.gate_scaling = "full"
    train_step(compiled, inputs)
    full = gradients(model)
    _, eager_full = train_step(model, inputs)
    assert_same(full, eager_full, rtol=1e-4)
    name = next(n for n in grads if n.endswith("lora_B"))
    assert not torch.allclose(full[name], grads[name])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"expert_compute": "dense"},
        {"expert_compute": "fused", "top_p": 0.7, "shared_expert": True, "router_temperature": 1.5},
    ],
)
def test_no_graph_break_in_a_layer_that_hands_its_losses_over(options):
    name, layer = next(iter(layers(adapted(router_aux_loss_coef=0.5, **options)).items()))
    x = torch.randn(2, 3, layer.in_features)

    def losses(call):
        start_collecting(layer, BatchLayout(grid=(2, 3)))
        call(x)
        (record,) = stop_collecting(layer)
        assert record.layer.endswith(name.removeprefix("base_model.model."))
        return torch.autograd.grad(record.losses.balance, layer.experts("default").router.weight)

    torch._dynamo.reset()
    compiled = torch.compile(type(layer).forward, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(losses(lambda x: compiled(layer, x)), losses(layer))
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16_model(autocast_adapter_dtype):
    model = get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    loss, grads = train_step(model, batch())
    assert {g.dtype for g in grads.values()} == {dtype}
    exact = get_peft_model(llama(), config())
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(loss.float(), train_step(exact, batch())[0], rtol=2e-2, atol=0)


def test_encoder_decoder():
    fields = config(target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM", router_aux_loss_coef=0.5)
    model = get_peft_model(t5(), fields)
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, :6].contiguous()
    loss, grads = train_step(model, inputs)
    assert grads
    assert torch.isfinite(loss)
    assert model.base_model.last_aux_loss >= 0
