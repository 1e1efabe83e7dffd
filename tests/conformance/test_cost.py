"""What a step costs: collectives, bytes, memory, and no wait for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_cost import peak_bytes
from ds_moelora import GateRiemannianAdamW, GateRiemannianMuon
from ds_moelora.optimizer import preconditioner
from ds_moelora.pairs import LoraPair, tag_pair

from ..support.mixture import SHAPES, Stack
from ..support.plain_lora import plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import engine_config, loraplus_groups, one_group, run_engine

WIDE = [(7, 5, 3, 3), (5, 1101, 2, 5), (1101, 7, 3, 3)]  # SHAPES with a hundredfold inner width


def traffic(
    stage: int,
    world: int,
    model: Callable[[], nn.Module],
    groups: Any = one_group,
    kind: str = "GateRiemannianAdamW",
) -> list[list[list[float]]]:
    """Bytes sent in every collective of every call of `step()`, by process."""
    config = engine_config(stage, kind)
    results = run_on_ranks(world, run_engine, config=config, model=model, groups=groups, steps=3)
    return [result["traffic"] for result in results]


def most(by_process: list[list[list[float]]]) -> float:
    """Bytes that one process sends in one call. All processes must have equally many collectives in it."""
    for calls in zip(*by_process, strict=True):
        assert len({len(call) for call in calls}) == 1
    return max(sum(call) for calls in by_process for call in calls)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_do_not_depend_on_in_and_out(stage: int, world: int, report: Callable[[str, str], None]) -> None:
    """One collective, of no more than an all-reduce of one triangle of every Gram matrix and two rows per boundary."""
    grams = 4 * sum(experts * rank * (rank + 1) for _, _, experts, rank in SHAPES)
    boundaries = (world - 1) * (1 if stage < 3 else 2 * len(SHAPES))
    rows = 4 * 2 * boundaries * max(rank for *_, rank in SHAPES)
    for width, shapes in (("narrow", SHAPES), ("wide", WIDE)):
        found = traffic(stage, world, functools.partial(Stack, shapes))
        assert all(len(step) == 1 for step in found[0])
        report(
            "Bytes that one process sends per step",
            f"stage {stage} world {world} {width:6s}: {most(found):.0f}; all Gram matrices {grams}, cut rows {rows}",
        )
        assert most(found) <= 2 * (world - 1) / world * (grams + rows)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_bytes_of_muon(stage: int, report: Callable[[str, str], None]) -> None:
    """One collective where factors are stepped, of float64 triangles for A, B and both gradients; none elsewhere."""
    grams = 4 * sum(4 * experts * rank * (rank + 1) for _, _, experts, rank in SHAPES)
    rows = 8 * 2 * (1 if stage < 3 else 2 * len(SHAPES)) * max(rank for *_, rank in SHAPES)
    for shapes in (SHAPES, WIDE):
        found = traffic(stage, 2, functools.partial(Stack, shapes), kind="GateRiemannianMuon")
        report(
            "Bytes that one process sends per step",
            f"stage {stage} world 2 Muon: {most(found):.0f}; all Gram matrices {grams}, cut rows at most {rows}",
        )
        assert sorted(map(len, found[0]))[-3:] == [1, 1, 1]
        assert sum(map(len, found[0])) == 3  # one in each step: other parameters' groups have none
        assert most(found) <= grams + rows


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_pairs_in_two_groups_cost_one_collective_per_group(stage: int) -> None:
    """LoRA+ groups (B; the rest; A): all Gram matrices with the first, at most a cut row's gradient with the last."""
    found = traffic(stage, 2, functools.partial(Stack, SHAPES), loraplus_groups)
    first, rest, last = ([calls[k::3] for calls in found] for k in range(3))
    assert all(len(step) == 1 for step in first[0])
    assert all(step == [] for step in rest[0])
    assert all(len(step) <= 1 for step in last[0])
    assert most(last) < most(first)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_plain_lora_costs_at_most_one_more(stage: int) -> None:
    """PEFT's A is rank first: a second collective carries weight and gradient of those that a boundary cuts."""
    found = traffic(stage, 2, plain_lora)
    whole = 4 * 2 * sum(p.numel() for n, p in plain_lora().named_parameters() if "lora_A" in n)
    most(found)
    for step in (step for calls in found for step in calls):
        assert 1 <= len(step) <= 2
        if len(step) == 2:
            assert step[0] <= whole


def big_pairs(layers: int = 6, experts: int = 4, width: int = 512, rank: int = 8) -> list[nn.Parameter]:
    params = []
    for i in range(layers):
        A, B = (nn.Parameter(torch.randn(experts, width, rank)) for _ in range(2))
        tag_pair(LoraPair(f"layer{i}", experts, rank), A, B)
        params += [A, B]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize(("kind", "per_gram"), [(GateRiemannianAdamW, 8), (GateRiemannianMuon, 20)])
def test_extra_memory_of_a_step(
    kind: Any, per_gram: int, report: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the Gram matrices: the sums, two damped copies with their factors, the chosen one, the inverse. Muon's are
    twice as many, in float64.
    """
    monkeypatch.setattr(preconditioner, "on_host", lambda tensor: False)  # which needs more: both attempts, always
    params = big_pairs()
    optimizer = kind(params, lr=1e-3)
    optimizer.step()  # makes the state and the plan
    peak = peak_bytes(optimizer.step)
    pair = sum(p.numel() * 4 for p in params[:2])
    grams = 4 * sum(len(p) * p.shape[-1] ** 2 for p in params)
    report(
        "Peak extra memory of step()",
        f"{kind.__name__}: {peak} bytes; largest pair's gradient {pair}, Gram matrices {grams}; all {6 * pair}",
    )
    assert peak <= 2 * pair + per_gram * grams


class NoHostSync(TorchDispatchMode):
    """Raises on the operations that wait for a device to hand the host a value; tensors pass for a device's."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_linalg_check_errors", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __enter__(self) -> NoHostSync:
        self._on_host, preconditioner.on_host = preconditioner.on_host, lambda tensor: False
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        preconditioner.on_host = self._on_host
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        name = func._schema.name.removeprefix("aten::")
        if name in self.FORBIDDEN:
            raise AssertionError(f"{name} synchronises host and device")
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation() -> None:
    optimizer = GateRiemannianAdamW(big_pairs(2))
    optimizer.step()
    with NoHostSync() as mode:
        optimizer.step()
    assert mode.seen > 10
    with pytest.raises(AssertionError, match="synchronises"), NoHostSync():
        torch.ones(1).item()


def sharded_step_under_watch(stage: int) -> int:
    """On every rank: the second step of an engine's basic optimizer, watched."""
    import deepspeed
    import torch.distributed as dist

    import ds_moelora  # noqa: F401

    from ..support.mixture import batches

    model = Stack(SHAPES)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=one_group(model), config=engine_config(stage, "GateRiemannianAdamW")
    )
    seen = []
    step = engine.basic_optimizer.step

    def watched() -> None:
        if len(seen) < 1:
            seen.append(0)
            return step()
        with NoHostSync() as mode:
            step()
        seen.append(mode.seen)
        return None

    engine.basic_optimizer.step = watched
    for micro in batches(3, 1, dist.get_world_size()):
        engine.backward(engine(*micro[0][dist.get_rank()]))
        engine.step()
    engine.destroy()
    return min(seen[1:])


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_no_host_synchronisation_when_sharded(stage: int) -> None:
    assert all(seen > 10 for seen in run_on_ranks(2, sharded_step_under_watch, stage=stage))
