"""`experts_forward` computes what PEFT computes on MoE bases, and scales gradients by the base's gates."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ds_moelora import GateRiemannianAdamW, MoELoRAConfig, tag_lora_pairs, use_lora_experts
from ds_moelora.tuner.base_experts import NAME, check_auto_ep, factors, gate_of
from ds_moelora.tuner.files.export import export_adapter

from ..support.base_experts import ARCHITECTURES, TARGETS, base_model, lora_model, tokens


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and every gradient."""
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def both(model: Any, change: Callable[[Any], Any] = lambda model: model) -> float:
    """The largest relative deviation, of logits and gradients, between PEFT's way and ours."""
    model.get_input_embeddings().weight.requires_grad_(True)  # its gradient has passed every layer
    ours = copy.deepcopy(model)
    assert use_lora_experts(ours) > 0
    (logits, grads), (our_logits, our_grads) = run(model), run(change(ours))
    assert grads.keys() == {name.replace("_orig_mod.", "") for name in our_grads}
    assert any("experts" in name and "lora_A" in name for name in grads)
    assert not torch.allclose(logits, run_without_adapter(ours))
    pairs = [(logits, our_logits), *zip(grads.values(), our_grads.values(), strict=True)]
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in pairs)


def run_without_adapter(model: Any) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_gradients_are_pefts(architecture: str, report: Callable[[str, str], None]) -> None:
    found = both(lora_model(architecture))
    report("LoRA on base experts: deviation from PEFT's outputs and gradients", f"{architecture}: {found:.1e}")
    assert found < 2e-5


def test_two_active_adapters_one_stack_alone_and_rslora() -> None:
    model = lora_model("mixtral", use_rslora=True)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert both(model) < 2e-5
    assert both(lora_model("qwen3_moe", target_parameters=TARGETS[1:])) < 2e-5


def test_gradient_checkpointing_and_compile() -> None:
    def checkpointed(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    assert both(lora_model("mixtral").train(), checkpointed) < 2e-5
    small = get_peft_model(base_model("mixtral", num_hidden_layers=1), mixed_config())  # with mixtures on attention
    assert both(small, lambda model: torch.compile(model, backend="eager")) < 2e-5


def formula(base: Any, wrappers: dict[str, Any], x: Tensor, index: Tensor, gates: Tensor, power: float) -> Tensor:
    """The detach formula, one expert at a time: y = sum_e g_e f_e, d f_e of A and B has g_e^power in place of g_e."""
    low_rank = {name: factors(wrapper, "default") for name, wrapper in wrappers.items()}
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e, g in zip(index[t].tolist(), gates[t], strict=True):
            ratio = g.detach() ** (power - 1)

            def linear(v: Tensor, name: str, e: int = e, ratio: Tensor = ratio) -> Tensor:
                A, B = (factor[e] for factor in low_rank[name])
                # Values as they are; gradients of A and B times `ratio`.
                A, B = (f.detach() + ratio * (f - f.detach()) for f in (A, B))
                return getattr(base, name)[e] @ v + wrappers[name].scaling["default"] * (B @ (A @ v))

            gate, up = linear(x[t], "gate_up_proj").chunk(2)
            y[t] = y[t] + g * linear(base.act_fn(gate) * up, "down_proj")
    return y


@pytest.mark.parametrize(("scaling", "power"), [("none", 1.0), ("sqrt", 0.5), ("full", 0.0)])
def test_gate_scaling(scaling: str, power: float, report: Callable[[str, str], None]) -> None:
    model = lora_model("mixtral").double()
    assert use_lora_experts(model) == 2
    outer = model.base_model.model.model.layers[0].mlp.experts
    base, wrappers = outer.get_base_layer(), {}
    for wrapper in (outer, outer.base_layer):
        wrappers[wrapper.parameter_name] = wrapper
    settings = gate_of(base)
    assert settings is not None
    settings.gate_scaling = scaling
    x = torch.randn(5, 16, dtype=torch.double, requires_grad=True)
    gates = torch.rand(5, 2, dtype=torch.double).requires_grad_()
    index = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    dy = torch.randn(5, 16, dtype=torch.double)
    inputs = [
        x,
        gates,
        *(f for w in wrappers.values() for f in (w.lora_A["default"].weight, w.lora_B["default"].weight)),
    ]
    found = torch.autograd.grad(outer(x, index, gates), inputs, dy)
    wanted = torch.autograd.grad(formula(base, wrappers, x, index, gates, power), inputs, dy)
    deviation = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))
    report("LoRA on base experts: gate scaling against float64 autograd", f"{scaling}: {deviation:.1e}")
    assert deviation < 1e-12
    if scaling != "none":  # the comparison can fail
        exact = torch.autograd.grad(formula(base, wrappers, x, index, gates, 1.0), inputs, dy)
        assert not torch.allclose(exact[2], found[2])
        assert torch.allclose(exact[0], found[0])
        settings.scale_input_grad = True
        assert not torch.allclose(torch.autograd.grad(outer(x, index, gates), inputs, dy)[0], exact[0])


def test_the_optimizer_sets_the_gate_scaling() -> None:
    model = lora_model("olmoe")
    use_lora_experts(model)
    assert tag_lora_pairs(model) == 4
    optimizer = GateRiemannianAdamW((p for p in model.parameters() if p.requires_grad), gate_scaling="full")
    gates = [gate_of(m) for m in model.modules() if gate_of(m) is not None]
    assert [gate.gate_scaling for gate in gates] == ["full", "full"]
    run(model)
    optimizer.step()
    del optimizer
    assert [gate.gate_scaling for gate in gates] == ["none", "none"]


def test_what_it_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="target_parameters"):
        use_lora_experts(nn.Linear(2, 2))
    for spoil, message in (
        (lambda base: base.requires_grad_(True), "trained themselves"),
        (lambda base: base.to(torch.float8_e4m3fn), "quantized"),
        (lambda base: setattr(base, "_is_expert_parallel", True), "over processes"),
        (lambda base: delattr(base, "has_gate"), "ALL_EXPERTS_FUNCTIONS"),
    ):
        model = lora_model("mixtral")
        spoil(model.base_model.model.model.layers[1].mlp.experts.get_base_layer())
        with pytest.raises(ValueError, match=message):
            use_lora_experts(model)
        assert model.config._experts_implementation != NAME


def test_auto_ep_is_refused() -> None:
    config = SimpleNamespace(expert_parallel_config=SimpleNamespace(enabled=True))
    check_auto_ep(SimpleNamespace(_config=config, module=nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="AutoEP"):
        check_auto_ep(SimpleNamespace(_config=config, module=lora_model("mixtral")))


def mixed_config(**more: Any) -> MoELoRAConfig:
    options = {"r": 2, "num_experts": 3, "target_modules": ["q_proj"], "target_parameters": TARGETS}
    return MoELoRAConfig(**{**options, "init_lora_weights": False, **more})


def test_mixtures_on_attention_beside_lora_on_the_base_s_experts(tmp_path: Path) -> None:
    model = get_peft_model(base_model("mixtral"), mixed_config())
    assert use_lora_experts(model) == 2
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pairs = {p.lora_pair for name, p in trained.items() if "router" not in name}
    assert sorted(pair.num_experts for pair in pairs) == [3, 3, 4, 4, 4, 4]  # tagged, without a call
    assert all(pair.gate is not None for pair in pairs)
    optimizer = GateRiemannianAdamW(list(trained.values()), lr=1e-2)
    before = {name: p.clone() for name, p in trained.items()}
    for _ in range(2):
        run(model)
        optimizer.step()
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]
    logits = model.eval()(input_ids=tokens()).logits.detach()
    assert not torch.allclose(run_without_adapter(model), logits)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("mixtral"), tmp_path).eval()
    assert torch.allclose(loaded(input_ids=tokens()).logits, logits, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded.add_adapter("other", mixed_config())
    loaded.set_adapter("other")
    assert not torch.allclose(loaded(input_ids=tokens()).logits, logits, atol=1e-3)
    assert all(".other." in name for name, p in loaded.named_parameters() if p.requires_grad)
    loaded.delete_adapter("other")
    loaded.set_adapter("default")
    assert torch.allclose(loaded(input_ids=tokens()).logits, logits, atol=1e-5)

    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights[next(name for name in weights if name.endswith("lora_B.weight"))]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Missing"):
        PeftModel.from_pretrained(base_model("mixtral"), tmp_path)
    with pytest.raises(ValueError, match="stacked experts"):
        export_adapter(tmp_path, tmp_path / "plain")
    with pytest.raises(ValueError, match="ep_size=3"):
        mixed_config(ep_size=3)


def test_gate_scaling_without_effect_is_named() -> None:
    model = lora_model("mixtral")
    tag_lora_pairs(model)
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match=r"gate_scaling has no effect .*use_lora_experts"):
        GateRiemannianAdamW(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GateRiemannianAdamW(params, gate_scaling="none")
    use_lora_experts(model)
    tag_lora_pairs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GateRiemannianAdamW(params)
