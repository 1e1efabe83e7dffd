"""Which modules get a mixture: one rule for training and loading, and what is left out is named."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ds_moelora import MoELoRAConfig
from ds_moelora.tuner.targets import uncalled, weights_read_by

from ..support.adapter_support import VOCAB, batch, config, llama


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))


def jamba():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    mixers = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2}
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return JambaForCausalLM(JambaConfig(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **mixers, **periods))


def all_linear(**fields) -> MoELoRAConfig:
    return config(target_modules="all-linear", **fields)


@pytest.mark.parametrize(("make", "left_out"), [(mamba, "mixer.dt_proj"), (jamba, "mamba.dt_proj")])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_what_is_never_called_is_left_out_and_the_rest_loads_again(make, left_out, tmp_path) -> None:
    torch.manual_seed(0)
    base = make()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"leaves out .*{left_out}.*does not call"):
        model = get_peft_model(base, all_linear()).train()
    model(**batch(padded=False)).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 6
    assert not [name for name, grad in trained.items() if grad is None or not grad.any()]
    model.save_pretrained(tmp_path)
    again = make()
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    with torch.no_grad():
        inputs = batch(padded=False)
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    with pytest.raises(ValueError, match=r"dt_proj \(\w+ reads its weight and never calls it\)"):
        get_peft_model(make(), config(target_modules=["dt_proj"]))


class Reader(nn.Module):
    """Reads one weight, asks another for its dtype, and calls two modules, one of them in a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.asked, self.called, self.inner = (nn.Linear(4, 4) for _ in range(4))
        self.nested = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.nested.deep = self.nested["deep"]

    def forward(self, x):
        x = F.linear(x, self.read.weight) + F.linear(x, self.nested.deep.weight)
        return self.called(self.asked(x.to(self.asked.weight.dtype))) + self.rest(x)

    def rest(self, x):
        return self.inner(x)

    def not_in_the_forward_pass(self):
        return self.called.weight + self.asked.weight


def test_reads_are_found_in_the_source() -> None:
    assert weights_read_by(Reader) == {"read", "nested.deep"}
    assert set(uncalled(nn.Sequential(Reader()))) == {"0.read", "0.nested.deep"}
    assert uncalled(llama()) == {}
    assert set(uncalled(nn.Sequential(nn.MultiheadAttention(8, 2)))) == {"0.out_proj"}


class Lazy(nn.Module):
    """Its source does not tell that a module is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        weight = getattr(self, "idle").weight  # noqa: B009
        return {"loss": (self.used(x) @ weight).mean()}


def test_what_did_not_run_is_named_after_the_first_step() -> None:
    model = get_peft_model(
        Lazy(), MoELoRAConfig(r=2, target_modules=["used", "idle"], router_aux_loss_coef=0.0)
    ).train()
    with pytest.warns(UserWarning, match=r"1 adapted modules did not run in the first training forward pass: idle\."):
        model(torch.ones(2, 4))


def mixtral():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, num_key_value_heads=2, num_local_experts=4, **sizes))


def test_stacked_experts_are_named_with_who_adapts_them() -> None:
    with pytest.warns(UserWarning, match="stacked in one parameter") as caught:
        model = get_peft_model(mixtral(), all_linear())
    (said,) = [str(w.message) for w in caught if "stacked" in str(w.message)]
    assert "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj" in said
    base = [p for n, p in model.named_parameters() if "moelora" not in n]
    stacked = sum(p.numel() for p in base if p.dim() == 3)
    total = sum(p.numel() for p in base)
    assert f"{stacked:,} of the base model's {total:,} weights ({stacked / total:.0%})" in said
    assert "adapts 8 modules" in said  # 4 of attention in each layer; routers are no nn.Linear
    config = all_linear(target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    assert f"target_parameters={config.target_parameters}" in said
    with warnings.catch_warnings():  # does what was said, and has nothing more to say
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(mixtral(), config)
    assert sum(isinstance(module, ParamWrapper) for module in model.modules()) == 4


def adapted_names(model, adapter: str) -> set[str]:
    return {n.split(".moelora_experts")[0] for n, _ in model.named_parameters() if f".moelora_experts.{adapter}." in n}


def test_a_second_adapter_with_all_linear_is_where_the_first_is() -> None:
    model = get_peft_model(llama(), all_linear())
    model.add_adapter("second", all_linear(r=3))
    assert adapted_names(model, "second") == adapted_names(model, "default")
    assert len(adapted_names(model, "default")) == 14
    model.add_adapter("third", config(target_modules=["q_proj"]))
    model.add_adapter("fourth", all_linear(exclude_modules=["k_proj"]))
    assert adapted_names(model, "fourth") == {n for n in adapted_names(model, "default") if "k_proj" not in n}


def tied(**fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **fields))


@pytest.mark.filterwarnings("ignore:Model has")
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_into_a_tied_weight_is_refused(merge: str) -> None:
    fields = config(num_experts=1, top_k=1, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(tied(tie_word_embeddings=True), fields).eval()
    weight = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match=r"lm_head: its weight is the same parameter as model\.embed_tokens\.weight"):
        getattr(model, merge)()
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_merging_beside_a_tied_weight_is_exact() -> None:
    inputs = batch()
    for tie, targets in ((True, ["q_proj"]), (False, ["q_proj", "lm_head"])):
        fields = config(num_experts=1, top_k=1, target_modules=targets)
        model = get_peft_model(tied(tie_word_embeddings=tie), fields).eval()
        with torch.no_grad():
            before = model(**inputs).logits
            torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["hooks in the forward pass", "hooks in the recomputation"])
def test_hooks_that_come_and_go_change_no_gradient(first: bool) -> None:
    """As a profiler's, on the base layers and the routers, between a forward pass and its recomputation."""
    grads = []
    for hooked in (False, True):
        model = get_peft_model(llama(), config(target_modules=["q_proj"]))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        modules = [m for n, m in model.named_modules() if n.endswith(("q_proj.base_layer", "router"))]
        assert len(modules) == 4

        def hook(modules=modules) -> list:
            return [module.register_forward_hook(lambda module, args, output: None) for module in modules]

        handles = hook() if hooked and first else []
        loss = model(**batch()).loss
        for handle in handles:
            handle.remove()
        handles = hook() if hooked and not first else []
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)
