"""An optimizer in the DeepSpeed config makes an existing PEFT LoRA job exact at every stage; PEFT's own does not."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import peft.optimizers
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn

from ds_moelora import GateRiemannianAdamW, tag_lora_pairs

from ..support.mixture import batches
from ..support.plain_lora import MLP, plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import SHARDED, deviation, engine_config, full_weights, run_engine, run_reference
from ..support.versions import STAGE_3_ERROR, STAGE_3_LOSES_WRAPPED_MODULES

pytestmark = pytest.mark.dist

VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "bias": {"bias": "lora_only"},
    "two adapters": {"adapters": 2},
}


@functools.cache
def variant(name: str, tagged: bool) -> Callable[[], nn.Module]:
    return functools.partial(plain_lora, tagged=tagged, **VARIANTS[name])


@pytest.mark.parametrize(
    ("name", "world", "stage"),
    [
        *(("LoRA", 2, stage) for stage in (0, 1, 2, 3)),
        *((name, 2, stage) for name in ("DoRA", "modules_to_save", "bias") for stage in (2, 3)),
        *(("two adapters", world, stage) for world, stage in ((2, 0), (2, 1), (3, 2), (3, 3))),
        ("rsLoRA", 2, 2),  # another s, which these steps ignore
        ("LoRA", 3, 2),
        ("LoRA", 3, 3),
    ],
)
def test_equals_the_reference(name: str, world: int, stage: int, report: Callable[[str, str], None]) -> None:
    run = functools.partial(run_on_ranks, world, run_engine, model=variant(name, tagged=False))  # the engine tags it
    if stage == 3 and name == "modules_to_save" and STAGE_3_LOSES_WRAPPED_MODULES:
        with pytest.raises(AssertionError, match=STAGE_3_ERROR):  # plain AdamW too: test_deepspeed_limits.py
            run(config=engine_config(stage, "GateRiemannianAdamW"))
        return
    results = run(config=engine_config(stage, "GateRiemannianAdamW"))
    reference = run_reference("GateRiemannianAdamW", world, model=variant(name, tagged=True))["weights"]
    found = max(deviation(result["weights"], reference) for result in results)
    report("Plain PEFT LoRA with GateRiemannianAdamW", f"{name:16s} stage {stage} world {world}: {found:.1e}")
    assert found < 1e-5
    # Rank-first A costs one more all-reduce, which assembles the factors that a boundary cuts.
    assert all(len(calls) <= 2 for calls in results[0]["traffic"])


@pytest.mark.parametrize("kind", SHARDED)
def test_four_ranks(kind: str) -> None:
    results = run_on_ranks(4, run_engine, config=engine_config(3, kind), model=plain_lora)
    assert deviation(results[0]["weights"], run_reference(kind, 4, model=plain_lora)["weights"]) < 1e-5
    assert all(len(calls) <= 2 for calls in results[0]["traffic"])


def train_with_peft_optimizer(stage: int, which: str) -> dict[str, Any]:
    """On every rank: `create_riemannian_optimizer` (or a stand-in) as client optimizer of an engine."""
    import deepspeed

    model = plain_lora()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
    params = [p for p in model.parameters() if p.requires_grad]
    if which == "peft":
        optimizer = peft.optimizers.create_riemannian_optimizer(model, torch.optim.AdamW, reg=1e-4, **options)
    elif which == "ours":
        optimizer = GateRiemannianAdamW(params, damping=1e-4, **options)
    else:
        optimizer = torch.optim.AdamW(params, **options)
    config = engine_config(stage, "GateRiemannianAdamW")
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for micro in batches(10, 1, dist.get_world_size()):
        engine.backward(engine(*micro[0][dist.get_rank()]))
        engine.step()
    weights = full_weights(engine.module)
    engine.destroy()
    return weights


@pytest.mark.skipif(
    not hasattr(peft.optimizers, "create_riemannian_optimizer"), reason="this PEFT has no Riemannian optimizer"
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_peft_optimizer_is_silently_plain_under_zero(stage: int, report: Callable[[str, str], None]) -> None:
    """Stage 0: PEFT's Riemannian optimizer and ours agree. Stages 1 and 2: PEFT's equals plain AdamW, ours does not."""
    peft, ours, plain = (
        run_on_ranks(2, train_with_peft_optimizer, stage=stage, which=which)[0] for which in ("peft", "ours", "plain")
    )
    to_ours, to_plain = deviation(peft, ours), deviation(peft, plain)
    report(
        "peft.optimizers.create_riemannian_optimizer as client optimizer (maximum relative deviation)",
        f"stage {stage}: from GateRiemannianAdamW {to_ours:.1e}, from plain AdamW {to_plain:.1e}",
    )
    if stage == 0:
        assert to_ours < 1e-4
        assert to_plain > 1e-2
    else:
        assert to_plain == 0.0
        assert to_ours > 1e-2


def test_embeddings_are_left_alone_and_named() -> None:
    class WithEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 7)
            self.body = MLP()

    model = get_peft_model(WithEmbedding(), LoraConfig(r=2, target_modules=["embed", "first"]))
    with pytest.warns(UserWarning, match=r"embed"):
        assert tag_lora_pairs(model) == 1


def test_untagged_lora_is_refused() -> None:
    model = get_peft_model(MLP(), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="tag_lora_pairs"):
        GateRiemannianAdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="get_peft_model"):
        tag_lora_pairs(MLP())
    copied = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tag_lora_pairs(copied) == 1
