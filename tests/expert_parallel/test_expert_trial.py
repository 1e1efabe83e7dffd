"""What "auto" takes under expert parallelism: by trial, alike on all ranks, once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ds_moelora.expert_parallel import trial
from ds_moelora.expert_parallel.shard import ShardedExperts
from ds_moelora.expert_parallel.spec import ShardSpec

from ..support.expert_parallel import IN_FEATURES, adapted
from ..support.ranks import run_on_ranks
from ..support.training import engine_config

WAYS = [trial.Way(dispatch, compute) for dispatch in ("weights", "tokens") for compute in ("dense", "grouped")]
SPEC: dict[str, Any] = {
    "layer_name": "layer",
    "num_experts": 16,
    "ep_size": 4,
    "top_k": 2,
    "in_features": 8,
    "out_features": 8,
    "rank": 64,
    "bucket_layers": 1,
}


@given(st.lists(st.floats(1e-6, 10), min_size=4, max_size=4), st.sampled_from(WAYS))
def test_never_more_than_the_margin_off_the_fastest(seconds: list[float], usual: trial.Way) -> None:
    times = dict(zip(WAYS, seconds, strict=True))
    taken = trial.fastest(times, usual)
    assert times[taken] <= (1 + trial.MARGIN) * min(seconds)
    if times[usual] <= (1 + trial.MARGIN) * min(seconds):
        assert taken == usual


@pytest.mark.parametrize(
    ("dispatch", "compute", "expected"),
    [
        ("auto", "auto", WAYS),
        ("weights", "auto", WAYS[:2]),
        ("auto", "dense", [WAYS[0], WAYS[2]]),
        ("tokens", "grouped", [WAYS[3]]),
    ],
)
def test_fields_that_are_set_are_not_tried(dispatch: str, compute: str, expected: list[trial.Way]) -> None:
    assert trial.open_ways(ShardSpec(**SPEC, dispatch=dispatch, compute=compute)) == expected


def test_with_an_accelerator_grouped_products_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    assert trial.open_ways(ShardSpec(**SPEC, dispatch="auto", compute="auto")) == [WAYS[0], WAYS[2]]


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def choose(
    times: dict[int, dict[trial.Way, float]] | None = None, checkpointing: bool = False, empty_rank: bool = False
) -> tuple[set[trial.Way], list[str], list[int], float]:
    """On every rank: the ways of two layers, what was said, how often ways were tried by step, and the mean loss.

    Args:
        times: by rank, instead of measured ones. empty_rank: the first rank has no tokens.
    """
    import deepspeed

    trial._decided.clear()
    log, logger = Log(), logging.getLogger("ds_moelora")
    logger.addHandler(log)
    original, tried = trial._time_once, [0]

    def counted(way: trial.Way, *args: Any) -> float:
        tried[-1] += 1
        seconds = original(way, *args)
        return times[dist.get_rank()][way] if times else seconds

    trial._time_once = counted
    model = adapted(ep_size=2, checkpointing=checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=engine_config(1, "AdamW"))
    torch.manual_seed(dist.get_rank())
    count = dist.get_rank() * 5 if empty_rank else 3 * (1 + dist.get_rank())
    for _ in range(2):
        loss = engine(torch.randn(count, IN_FEATURES), torch.randn(count, 3))["loss"]
        engine.backward(loss)
        engine.step()
        tried.append(0)
    ways = {module.way for module in engine.module.modules() if isinstance(module, ShardedExperts)}
    engine.destroy()
    trial._time_once = original
    logger.removeHandler(log)
    return ways, log.lines, tried, loss.item()


@pytest.mark.dist
def test_ranks_that_measure_differently_agree() -> None:
    """By the slowest rank of each way: 3, 2, 4 and 9."""
    times = [dict(zip(WAYS, row, strict=True)) for row in ([1.0, 2.0, 4.0, 1.0], [3.0, 1.0, 1.0, 9.0])]
    (ways, lines, tried, _), (others, silent, _, _) = run_on_ranks(2, choose, times=dict(enumerate(times)))
    assert ways == others == {WAYS[1]}
    assert len(lines) == 2  # two layers of different sizes
    assert "took 'weights, grouped'" in lines[0]
    assert "MB" in lines[0]
    assert silent == []
    assert tried[0] > 0
    assert tried[1] == 0


@pytest.mark.dist
@pytest.mark.parametrize("empty_rank", [False, True])
def test_a_trial_leaves_no_trace(empty_rank: bool) -> None:
    """Also within a gradient checkpoint, and with a rank that has no tokens: the second step has the same loss."""
    (ways, _, _, loss), (others, _, _, _) = run_on_ranks(2, choose, checkpointing=True, empty_rank=empty_rank)
    assert ways == others
    fixed = run_on_ranks(2, choose, times={rank: dict.fromkeys(WAYS, 1.0) for rank in range(2)}, empty_rank=empty_rank)
    assert loss == pytest.approx(fixed[0][3], rel=1e-5)


def resumed_ways(dispatch: str) -> list[trial.Way | None]:
    """On every rank: the ways of a fresh model that loads the state of one which took ("tokens", "grouped")."""
    import deepspeed

    def engine() -> Any:
        model = adapted(ep_size=2, ep_dispatch=dispatch)
        trained = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, model_parameters=trained, config=engine_config(1, "AdamW"))[0]

    def layers(model: Any) -> list[ShardedExperts]:
        return [module for module in model.modules() if isinstance(module, ShardedExperts)]

    first, second = engine(), engine()
    for layer in layers(first.module):
        layer.way = WAYS[3]
    second.module.load_state_dict(first.module.state_dict())
    found = [layer.way for layer in layers(second.module)]
    first.destroy()
    second.destroy()
    return found


@pytest.mark.dist
def test_a_resumed_run_goes_the_way_that_was_taken() -> None:
    assert run_on_ranks(2, resumed_ways, dispatch="auto") == [[WAYS[3], WAYS[3]]] * 2
    assert run_on_ranks(2, resumed_ways, dispatch="weights") == [[None, None]] * 2
