"""PEFT's LoRA on stacked experts: every expert is a pair of its own, exact at every stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

from ds_moelora import tag_lora_pairs, use_lora_experts
from ds_moelora.pairs import LoraPair
from ds_moelora.tuner import base_experts

from ..support.ranks import run_on_ranks
from ..support.training import SHARDED, deviation, engine_config, run_engine, run_reference

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Three experts 7 -> 2 x 5 -> 3, all of which see every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 7))
        self.down_proj = nn.Parameter(torch.randn(3, 3, 5))

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        gate, up = torch.einsum("ti,eoi->eto", x, self.gate_up_proj).tanh().chunk(2, -1)
        return torch.einsum("eti,eoi,te->to", gate * up, self.down_proj, gates)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.head = nn.Linear(7, 3), Experts(), nn.Linear(3, 3)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.head(self.experts(x, self.router(x).softmax(-1))) - target).square().mean()


def stacked_lora(
    adapters: int = 1, tagged: bool = True, r: int = 2, partitioned: dict[str, Any] | None = None
) -> nn.Module:
    """Rank-2 LoRA on both stacks and the head. Several adapters: the last one is active.

    `partitioned`: a DeepSpeed config; the base's weights are then cut up over the ranks as they are made (`zero.Init`).
    """
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=4, target_modules=["head"], target_parameters=TARGETS, init_lora_weights=False)
    if partitioned is None:
        base = Base()
    else:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=partitioned, dtype=torch.float32):
            base = Base()
    model = get_peft_model(base, config)
    for i in range(1, adapters):
        model.add_adapter(f"other{i}", config)
        model.set_adapter(f"other{i}")
    if tagged:
        assert tag_lora_pairs(model) == 3 * adapters
    return model


WITH_ADAPTERS = {adapters: functools.partial(stacked_lora, adapters) for adapters in (1, 2)}


class Mixture(nn.Module):
    """Two of the three experts of transformers' own class see a token."""

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(num_local_experts=3, hidden_size=7, intermediate_size=5)
        self.router, self.experts, self.head = nn.Linear(7, 3), MixtralExperts(config), nn.Linear(7, 3)
        nn.init.normal_(self.experts.gate_up_proj)
        nn.init.normal_(self.experts.down_proj)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        gates, index = self.router(x).softmax(-1).topk(2)
        return (self.head(self.experts(x, index, gates)) - target).square().mean()


def grouped_lora(gate_scaling: str = "none") -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
    model = get_peft_model(Mixture(), config)
    assert use_lora_experts(model) == 1
    base_experts.gate_of(model.base_model.model.experts.get_base_layer()).gate_scaling = gate_scaling
    assert tag_lora_pairs(model) == 2
    return model


@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gates_of_the_base_scale_the_gradients(stage: int, report: Callable[[str, str], None]) -> None:
    """The optimizer's own default, "sqrt", in the engine; said to the layer in the reference."""
    kind = "GateRiemannianAdamW"
    results = run_on_ranks(2, run_engine, config=engine_config(stage, kind), model=grouped_lora)
    reference = run_reference(kind, 2, model=functools.partial(grouped_lora, "sqrt"))["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    report("LoRA on base experts, gate_scaling sqrt", f"stage {stage} world 2: {found:.1e}")
    assert found < 2e-5
    assert deviation(results[0]["weights"], run_reference(kind, 2, model=grouped_lora)["weights"]) > 1e-3


def test_every_expert_is_a_pair() -> None:
    model = stacked_lora()
    pairs = {p.lora_pair for p in model.parameters() if isinstance(getattr(p, "lora_pair", None), LoraPair)}
    assert sorted(pair.num_experts for pair in pairs) == [1, 3, 3]
    assert all(pair.rank == 2 and pair.scaling == 2.0 and pair.rank_first_A for pair in pairs)


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base_experts.check_layout.cache_clear()
    right = base_experts.factors
    monkeypatch.setattr(base_experts, "factors", lambda *args: (right(*args)[0], right(*args)[1].flip(0)))
    with pytest.raises(ValueError, match="another layout"):
        tag_lora_pairs(stacked_lora(tagged=False))
    monkeypatch.undo()
    base_experts.check_layout()


def most_bytes(kind: str, world: int) -> float:
    """What one step may reduce: Gram matrices of all experts, and what a boundary between processes cuts, with its
    gradient: of each lora_A one expert, of each lora_B one row.
    """
    r, pairs = 2, ((3, 7), (3, 5), (1, 3))  # experts, inputs
    grams = sum(2 * E * r * r for E, _ in pairs) * (1.5 if kind == "GateRiemannianMuon" else 1)
    cut = sum(2 * (r * inputs + r * E) for E, inputs in pairs)
    return 8 * (grams + (world - 1) * cut)


@pytest.mark.parametrize(
    ("kind", "stage", "world", "adapters"),
    [
        ("GateRiemannianAdamW", 0, 2, 1),
        ("GateRiemannianAdamW", 1, 3, 1),
        *(("GateRiemannianAdamW", stage, world, 1) for stage in (2, 3) for world in (1, 2, 3, 4)),
        *((kind, stage, 3, 1) for kind in SHARDED[1:] for stage in (2, 3)),
        ("GateRiemannianAdamW", 3, 2, 2),
    ],
)
@pytest.mark.dist
def test_equals_the_reference(
    kind: str, stage: int, world: int, adapters: int, report: Callable[[str, str], None]
) -> None:
    results = run_on_ranks(
        world, run_engine, config=engine_config(stage, kind), model=functools.partial(stacked_lora, adapters, False)
    )
    reference = run_reference(kind, world, model=WITH_ADAPTERS[adapters])["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    traffic = results[0]["traffic"]
    name = f"{kind:20s} stage {stage} world {world} adapters {adapters}"
    report("LoRA on stacked experts", f"{name}: {found:.1e}; bytes sent {traffic[-1]}")
    assert found < 2e-5
    assert all(len(calls) <= 2 for calls in traffic)
    assert all(sum(calls) <= most_bytes(kind, world) for calls in traffic)


@pytest.mark.dist
def test_a_base_that_is_cut_up_as_it_is_made(report: Callable[[str, str], None]) -> None:
    kind = "GateRiemannianAdamW"
    config = engine_config(3, kind)
    model = functools.partial(stacked_lora, tagged=False, partitioned=config)
    results = run_on_ranks(2, run_engine, config=config, model=model)
    reference = run_reference(kind, 2, model=stacked_lora)["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    report("LoRA on stacked experts", f"{kind:20s} stage 3 world 2, zero.Init: {found:.1e}")
    assert found < 2e-5
