"""Routing options on real ranks: the optimizers stay exact under ZeRO, expert parallelism changes nothing, and the
auxiliary losses have one gradient whatever the number of ranks and micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ds_moelora import MoELoRAConfig
from ds_moelora.tuner import MoELoRAExperts

from ..checkpoint.test_elastic import train
from ..support.expert_parallel import Net, adapted, run
from ..support.plain_lora import MLP
from ..support.ranks import run_on_ranks
from ..support.training import SHARDED, deviation, engine_config, run_engine, run_reference

pytestmark = pytest.mark.dist

# As in test_zero_exactness.py and test_expert_parallel.py: fp32 against float64, or fp32 sums in another order.
TOLERANCE = 1e-5

# Ranks well below the sizes: with r = in = 5 the fp32 reference itself is 1.3e-4 away from float64.
OPTIONS: dict[str, dict[str, Any]] = {
    "shared A": {"shared_A": True, "num_experts_pattern": {"second": 3}, "top_p": 0.8},
    "shared expert": {
        "shared_expert": True,
        "rank_pattern": {"second": 2},
        "num_experts_pattern": {"first": 2},
        "top_k_pattern": {"first": 1},
        "router_temperature": 0.7,
        "router_z_loss_coef": 0.1,
    },
}


def routed(**fields: Any) -> nn.Module:
    """7 -> 5 -> 11 -> 3 with mixtures of odd sizes on the first two layers, B away from zero."""
    torch.manual_seed(0)
    fields = {"r": 3, "num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.1, **fields}
    config = MoELoRAConfig(target_modules=["first", "second"], init_lora_weights=False, **fields)
    model = get_peft_model(MLP(), config)
    for module in model.modules():
        if isinstance(module, MoELoRAExperts):  # what the optimizer sets, for the reference, which does not
            module.pair.gate.gate_scaling = "sqrt"
    return model.train()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("stage", "kind"),
    [(0, "GateRiemannianSGD"), (1, "GateRiemannianMuon"), *((2, kind) for kind in SHARDED), (3, "GateRiemannianAdamW")],
)
def test_equals_the_whole_matrix_reference(
    options: str, stage: int, kind: str, report: Callable[[str, str], None]
) -> None:
    """10 steps on 2 ranks against float64. The reference takes the pairs as tagged; that a shared A is tagged as one
    LoRA of [B_1; ...; B_E] A is what test_shared_factors.py compares with the formula."""
    model = partial(routed, **OPTIONS[options])
    results = run_on_ranks(2, run_engine, config=engine_config(stage, kind), model=model)
    reference = run_reference(kind, 2, model=model)["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    report(
        "Routing options after 10 steps on 2 ranks (maximum relative deviation from the float64 reference)",
        f"{options:13s} {kind:20s} stage {stage}: {found:.1e}",
    )
    assert all(result["basic"] == kind for result in results)
    assert found < TOLERANCE


SPREAD = {
    "shared_expert": True,
    "num_experts_pattern": {"second": 8},
    "rank_pattern": {"first": 5},
    "top_k_pattern": {"second": 3},
    "top_p": 0.8,
    "router_z_loss_coef": 0.1,
}


@pytest.mark.parametrize("dispatch", ["weights", "tokens"])
@pytest.mark.parametrize(("stage", "kind"), [(0, "GateRiemannianSGD"), (1, "AdamW"), (2, "GateRiemannianAdamW")])
def test_expert_parallelism_changes_nothing(dispatch: str, stage: int, kind: str, tmp_path: Path) -> None:
    """A shared expert, other numbers per layer, top-p, both losses, clipping, accumulation, uneven batches; saved."""
    config = engine_config(stage, kind, clip=1.0, accumulate=2)
    wanted = run_on_ranks(2, run, config=config, how="uneven", model=SPREAD)[0]
    model = {**SPREAD, "ep_size": 2, "ep_dispatch": dispatch}
    path = str(tmp_path / "adapter")
    found = run_on_ranks(2, run, config=config, how="uneven", model=model, export=path)[0]
    for what in ("first", "weights"):
        assert deviation(found[what], {name: w.double() for name, w in wanted[what].items()}) < TOLERANCE
    assert any("shared.lora_A" in name for name in found["weights"])
    loaded = dict(PeftModel.from_pretrained(Net(), path, is_trainable=True).named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in found["weights"].items())


def test_a_checkpoint_with_other_numbers_per_layer_resumes_bit_equal(tmp_path: Path) -> None:
    config = engine_config(2, "GateRiemannianAdamW", clip=1.0)
    model = {**SPREAD, "ep_size": 2}
    whole = run_on_ranks(2, run, config=config, steps=4, model=model)[0]
    run_on_ranks(2, run, config=config, steps=2, model=model, save=str(tmp_path))
    resumed = run_on_ranks(2, run, config=config, steps=4, start=2, model=model, load=str(tmp_path))[0]
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in whole["weights"].items())


def refusal(fields: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="ep_size") as caught:
        adapted(**fields)
    return str(caught.value)


def test_every_layers_experts_must_divide_among_the_ranks() -> None:
    for message in run_on_ranks(2, refusal, fields={"ep_size": 2, "num_experts_pattern": {"second": 5}}):
        assert message.startswith("second: ep_size=2 must divide num_experts; with num_experts=5")


def aux_gradients(losses: dict[str, float], rows: int, accumulate: int) -> dict[str, Tensor]:
    """On every rank: the routers' gradients by the auxiliary losses alone, of one DeepSpeed step over `rows` sequences.

    Each rank takes an equal share of them, in `accumulate` equal micro-batches. The gradient is what one plain SGD
    step of lr 1 subtracts.
    """
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(rows, 5, 7, generator=torch.Generator().manual_seed(0))
    config = copy.deepcopy(engine_config(1, "GateRiemannianSGD", accumulate=accumulate))
    config["optimizer"] = {"type": "SGD", "params": {"lr": 1.0}}
    config["zero_allow_untested_optimizer"] = True
    module = adapted(aux=0.0, top_p=0.8, **losses)
    start = {n: p.detach().clone() for n, p in module.named_parameters() if n.endswith("router.weight")}
    trained = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    for part in x[rank::world].chunk(accumulate):
        # Both outputs of the loss: the model's own is 0, whatever it predicts.
        loss = engine(part, torch.zeros(len(part), 5, 3))["loss"]
        engine.backward(loss)
        engine.step()
    after = dict(engine.module.named_parameters())
    found = {name: weight - after[name].detach() for name, weight in start.items()}
    engine.destroy()
    return found


@pytest.mark.parametrize("loss", ["router_aux_loss_coef", "router_z_loss_coef"])
def test_gradients_do_not_depend_on_ranks_and_micro_batches(loss: str) -> None:
    """One mean over all sequences, however they are spread; the model's own loss is taken away by its difference."""

    def aux_alone(world: int, accumulate: int) -> dict[str, Tensor]:
        with_loss, without = (
            run_on_ranks(world, aux_gradients, losses={loss: coef}, rows=8, accumulate=accumulate)[0]
            for coef in (1.0, 0.0)
        )
        return {name: with_loss[name] - without[name] for name in with_loss}

    whole = aux_alone(1, 1)
    assert all(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for world, accumulate in ((1, 4), (2, 1), (2, 4)):
        assert deviation(aux_alone(world, accumulate), {n: g.double() for n, g in whole.items()}) < TOLERANCE


def started_under_zero_init() -> list[str]:
    """Names of parameters whose starting values are not those of a model built without `deepspeed.zero.Init`."""
    import deepspeed

    fields = {"shared_expert": True, "shared_A": True}
    plain = dict(routed(**fields).named_parameters())
    zero = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=zero):
        model = routed(**fields)
    different = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                if not torch.equal(p, plain[name]):
                    different.append(name)
    return different


def test_starting_values_are_the_same_under_zero_init() -> None:
    """There a module's parameters are cut up as soon as its constructor returns: it has to draw them itself."""
    assert run_on_ranks(2, started_under_zero_init) == [[], []]


@pytest.mark.parametrize(("options", "ep_size"), [(SPREAD, 2), (OPTIONS["shared A"], 1)])
def test_elastic_checkpoints_go_on_in_another_topology(options: dict[str, Any], ep_size: int, tmp_path: Path) -> None:
    kind, folder = "GateRiemannianAdamW", str(tmp_path / "elastic")
    whole = run_on_ranks(1, train, stage=0, ep_size=1, kind=kind, first=0, last=6, **options)[0]
    run_on_ranks(2, train, stage=1, ep_size=ep_size, kind=kind, first=0, last=3, save=folder, **options)
    last = run_on_ranks(2, train, stage=3, ep_size=1, kind=kind, first=3, last=6, load=folder, **options)[0]
    assert deviation(last["weights"], whole["weights"]) < TOLERANCE
