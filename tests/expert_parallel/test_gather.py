"""Several layers' experts in one all-gather: fewer collectives, the same training, in whatever order layers run."""

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

from ..support.expert_parallel import whole_weights
from ..support.ranks import run_on_ranks
from ..support.training import deviation, engine_config

pytestmark = pytest.mark.dist

LAYERS = 5
LAYER_BYTES = 4 * 4 * 2 * (6 + 6)  # 4 experts of rank 2, 6 -> 6, float32
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor")


class Deep(nn.Module):
    """Five layers; `blocks` of them between checkpoints (0: none); `path` names the layers in order of their calls.

    only_first: layers behind the first checkpoint are called without one.
    """

    def __init__(self, blocks: int, reentrant: bool, only_first: bool, path: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(LAYERS)])
        self.blocks, self.reentrant, self.only_first, self.path = blocks, reentrant, only_first, path

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = self.blocks or len(self.path)
        for start in range(0, len(self.path), size):

            def block(x: Tensor, part: tuple[int, ...]) -> Tensor:
                for i in part:
                    x = self.layers[i](x).tanh()
                return x

            part = tuple(self.path[start : start + size])
            checkpointed = self.blocks and not (start and self.only_first)
            x = checkpoint(block, x, part, use_reentrant=self.reentrant) if checkpointed else block(x, part)
        return {"loss": x.square().sum()}


def train(
    windows: int,
    stage: int = 0,
    blocks: int = 0,
    reentrant: bool = False,
    only_first: bool = False,
    path: list[int] | None = None,
    later: list[int] | None = None,
    evaluate: bool = False,
    two_adapters: bool = False,
) -> dict[str, Any]:
    """On every rank: losses and weights of four steps, and the collectives of the last one's forward and backward.

    Args:
        windows: layers that fit into one. later: another path from step 3 on. evaluate: a pass without gradients before
            each step, in which the model ends after two layers. two_adapters: both active.
    """
    import deepspeed

    from ds_moelora.expert_parallel.shard import ShardedExperts

    torch.manual_seed(0)
    path = path or list(range(LAYERS))
    adapter = MoELoRAConfig(
        r=2,
        num_experts=4,
        target_modules=r".*layers\.\d",
        init_lora_weights=False,
        router_aux_loss_coef=0.0,
        ep_size=2,
        ep_dispatch="weights",
        expert_compute="dense",
    )
    model = get_peft_model(Deep(blocks, reentrant, only_first, path), adapter)
    if two_adapters:
        model.add_adapter("other", adapter)
        model.base_model.set_adapter(["default", "other"])
    trained = [p for p in model.parameters() if p.requires_grad]
    config = engine_config(stage, "GateRiemannianSGD", clip=1.0)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    for module in model.modules():
        if isinstance(module, ShardedExperts):
            module.gathers._window_bytes = windows * LAYER_BYTES
    generator = torch.Generator().manual_seed(dist.get_rank())
    counted: Counter[str] = Counter()
    losses = []
    base = engine.module.get_base_model()
    for step in range(4):
        if later and step == 2:
            base.path = later
        x = torch.randn(7, 6, generator=generator).requires_grad_(reentrant)
        if evaluate:
            usual, base.path = base.path, [0, 1]
            with torch.no_grad():
                losses.append(engine(x)["loss"].item())
            base.path = usual
        restore = count_calls(counted) if step == 3 else lambda: None
        loss = engine(x)["loss"]
        engine.backward(loss)
        restore()
        engine.step()
        losses.append(loss.item())
    result = {"losses": losses, "weights": whole_weights(engine.module), "calls": [counted[c] for c in COLLECTIVES]}
    copied = copy.deepcopy(engine.module)  # nothing of a pass may be kept
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


def collectives(**options: Any) -> dict[int, list[int]]:
    """Trains with windows of 1, 2 and 5 layers, which must not matter; returns the collectives of each."""
    calls = {}
    wanted = run_on_ranks(2, train, windows=1, **options)[0]
    for windows in (1, 2, LAYERS):
        found = wanted if windows == 1 else run_on_ranks(2, train, windows=windows, **options)[0]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
        # The same sums in the same order: only the optimizer's own exchange may round differently.
        assert deviation(found["weights"], {n: w.double() for n, w in wanted["weights"].items()}) < 1e-6
        calls[windows] = found["calls"]
    return calls


def test_fewer_collectives() -> None:
    """Per window a gather each way, and one reduce-scatter."""
    assert collectives(stage=2) == {1: [10, 5], 2: [6, 3], 5: [2, 1]}


def test_gradient_checkpointing() -> None:
    """Blocks of three layers: what is run again has windows of its own, which the backward pass uses as well."""
    assert collectives(blocks=3) == {1: [13, 5], 2: [7, 3], 5: [3, 1]}
    collectives(blocks=3, reentrant=True)
    assert collectives(blocks=3, only_first=True)[LAYERS] == [2, 1]


def test_passes_that_end_early_leave_nothing_behind() -> None:
    """A window that has been gathered for layers which did not come would be stale after the step."""
    collectives(evaluate=True)


def test_layers_called_twice_or_out_of_turn() -> None:
    collectives(path=[0, 1, 2, 1, 3, 4])
    collectives(path=[0, 1, 2, 3, 4], later=[0, 3, 2, 1])
    collectives(path=[0, 1, 2, 3, 4], later=[1, 4])


def test_two_adapters_at_once() -> None:
    collectives(two_adapters=True)
