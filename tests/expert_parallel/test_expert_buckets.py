"""Several layers' experts in one all-gather: fewer collectives, the same training."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_moelora import MoELoRAConfig
from ds_moelora.expert_parallel.gather import Schedule

from ..support.expert_parallel import whole_weights
from ..support.ranks import run_on_ranks
from ..support.training import deviation, engine_config

pytestmark = pytest.mark.dist

LAYERS = 5
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor")


class Deep(nn.Module):
    """Five layers; `blocks` of them between checkpoints (0: none); `path` names the layers in order of their calls."""

    def __init__(self, blocks: int, reentrant: bool, path: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(LAYERS)])
        self.blocks, self.reentrant, self.path = blocks, reentrant, path

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = self.blocks or len(self.path)
        for start in range(0, len(self.path), size):

            def block(x: Tensor, part: tuple[int, ...]) -> Tensor:
                for i in part:
                    x = self.layers[i](x).tanh()
                return x

            part = tuple(self.path[start : start + size])
            x = checkpoint(block, x, part, use_reentrant=self.reentrant) if self.blocks else block(x, part)
        return {"loss": x.square().sum()}


def train(
    bucket: int,
    stage: int = 0,
    blocks: int = 0,
    reentrant: bool = False,
    path: list[int] | None = None,
    later: list[int] | None = None,
    evaluate: bool = False,
) -> dict[str, Any]:
    """On every rank: losses and weights of four steps, and the collectives of the last one's forward and backward.

    Args:
        bucket: ep_bucket_layers. later: another path from step 3 on. evaluate: a pass without gradients before.
    """
    import deepspeed

    torch.manual_seed(0)
    path = path or list(range(LAYERS))
    model = get_peft_model(
        Deep(blocks, reentrant, path),
        MoELoRAConfig(
            r=2,
            num_experts=4,
            target_modules=r".*layers\.\d",
            init_lora_weights=False,
            router_aux_loss_coef=0.0,
            ep_size=2,
            ep_dispatch="weights",
            ep_bucket_layers=bucket,
            expert_compute="dense",
        ),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    config = engine_config(stage, "GateRiemannianSGD", clip=1.0)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    counted: Counter[str] = Counter()
    losses = []
    for step in range(4):
        if later and step == 2:
            engine.module.get_base_model().path = later
        x = torch.randn(7, 6, generator=generator).requires_grad_(reentrant)
        if evaluate:
            with torch.no_grad():
                losses.append(engine(x)["loss"].item())
        restore = count_calls(counted) if step == 3 else lambda: None
        loss = engine(x)["loss"]
        engine.backward(loss)
        restore()
        engine.step()
        losses.append(loss.item())
    result = {"losses": losses, "weights": whole_weights(engine.module), "calls": [counted[c] for c in COLLECTIVES]}
    copied = copy.deepcopy(engine.module)  # a bucket must not hold anything of a pass
    assert copied.state_dict().keys() == engine.module.state_dict().keys()
    engine.destroy()
    return result


def count_calls(counted: Counter[str]) -> Any:
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, watched(name))
    return lambda: [setattr(dist, name, original) for name, original in originals.items()]


def same(**options: Any) -> dict[int, list[int]]:
    """Trains with buckets of 1, 2 and 5 layers; returns the collectives of each."""
    calls = {}
    wanted = run_on_ranks(2, train, bucket=1, **options)[0]
    for bucket in (1, 2, LAYERS):
        found = wanted if bucket == 1 else run_on_ranks(2, train, bucket=bucket, **options)[0]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        # The same sums in the same order: only the optimizer's own exchange may round differently.
        assert deviation(found["weights"], {n: w.double() for n, w in wanted["weights"].items()}) < 1e-6
        calls[bucket] = found["calls"]
    return calls


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_same_training_with_fewer_collectives(stage: int) -> None:
    # Per bucket a gather each way and one reduce-scatter.
    assert same(stage=stage, evaluate=stage == 1) == {1: [10, 5], 2: [6, 3], 5: [2, 1]}


def test_gradient_checkpointing_across_buckets() -> None:
    """Blocks of three layers, buckets of two: one bucket lies in two blocks. Recomputing gathers once more, at most."""
    assert same(blocks=3) == {1: [15, 5], 2: [9, 3], 5: [3, 1]}


def test_reentrant_checkpointing_goes_layer_by_layer() -> None:
    """Its graph ends at each checkpoint, so that only the forward pass is bucketed."""
    assert same(blocks=3, reentrant=True) == {1: [15, 5], 2: [13, 5], 5: [11, 5]}


def test_layers_called_twice_or_out_of_turn() -> None:
    assert same(path=[0, 1, 2, 1, 3, 4])[1] == [12, 6]
    same(path=[0, 1, 2, 3, 4], later=[0, 3, 2, 1])
    same(path=[0, 1, 2, 3, 4], later=[1, 4])


def test_only_neighbours_of_one_kind_share_a_bucket() -> None:
    class Layer:
        place: Any = None

        def __init__(self, kind: str | None) -> None:
            self.kind = kind

        def bucket_key(self) -> str | None:
            return self.kind

    layers = [Layer(kind) for kind in ("a", "a", "a", None, "a", "b", "b")]
    schedule = Schedule(2)
    for layer in (*layers, layers[0]):  # the second pass begins: the order is known
        schedule.saw(layer)
    places = [layer.place and (layers.index(layer.place[0].layers[0]), layer.place[1]) for layer in layers]
    assert places == [(0, 0), (0, 1), (2, 0), None, (4, 0), (5, 0), (5, 1)]
