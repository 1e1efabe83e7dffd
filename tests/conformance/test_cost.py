"""What a step costs: collectives, bytes, memory, and no wait for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
) -> list[list[Any]]:
    config = engine_config(stage, kind)
    return run_on_ranks(world, run_engine, config=config, model=model, groups=groups, steps=3)[0]["traffic"]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_do_not_depend_on_in_and_out(stage: int, world: int, report: Callable[[str, str], None]) -> None:
    """One all-reduce of at least the Gram matrices and at most two rows per boundary more, whatever the width."""
    grams = 4 * sum(2 * experts * rank**2 for _, _, experts, rank in SHAPES)
    boundaries = (world - 1) * (1 if stage < 3 else 2 * len(SHAPES))
    rows = 4 * 2 * boundaries * max(rank for *_, rank in SHAPES)
    for width, shapes in (("narrow", SHAPES), ("wide", WIDE)):
        calls = traffic(stage, world, functools.partial(Stack, shapes))
        assert all(len(step) == 1 for step in calls)
        found = {numel * size for step in calls for numel, size in step}
        report(
            "Bytes of the one all-reduce per step",
            f"stage {stage} world {world} {width:6s}: {sorted(found)}; Gram matrices {grams}, cut rows at most {rows}",
        )
        assert all(grams <= nbytes <= grams + rows for nbytes in found)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_of_muon(stage: int, report: Callable[[str, str], None]) -> None:
    """One all-reduce where factors are stepped, of one float64 triangle for A, B and both gradients; none elsewhere."""
    grams = 4 * sum(4 * experts * rank * (rank + 1) for _, _, experts, rank in SHAPES)
    rows = 8 * 2 * (1 if stage < 3 else 2 * len(SHAPES)) * max(rank for *_, rank in SHAPES)
    for shapes in (SHAPES, WIDE):
        calls = [
            step for step in traffic(stage, 2, functools.partial(Stack, shapes), kind="GateRiemannianMuon") if step
        ]
        assert len(calls) == 3  # one in each step: other parameters' groups have none
        assert all(len(step) == 1 for step in calls)
        found = {numel * size for step in calls for numel, size in step}
        report(
            "Bytes of the one all-reduce per step",
            f"stage {stage} world 2 Muon: {sorted(found)}; Gram matrices {grams}, cut rows at most {rows}",
        )
        assert all(grams <= nbytes <= grams + rows for nbytes in found)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pairs_in_two_groups_cost_one_all_reduce_per_group(stage: int) -> None:
    """LoRA+ groups (B; the rest; A): all Gram matrices with the first, at most a cut row's gradient with the last."""
    calls = traffic(stage, 2, functools.partial(Stack, SHAPES), loraplus_groups)
    first, rest, last = calls[::3], calls[1::3], calls[2::3]
    assert all(len(step) == 1 for step in first)
    assert all(step == [] for step in rest)
    assert all(len(step) <= 1 for step in last)
    assert max(numel for step in last for numel, _ in step or [(0, 0)]) < min(numel for ((numel, _),) in first)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_plain_lora_costs_at_most_one_more(stage: int) -> None:
    """PEFT's A is rank first: a second all-reduce carries weight and gradient of those that a boundary cuts."""
    calls = traffic(stage, 2, plain_lora)
    whole = 4 * 2 * sum(p.numel() for n, p in plain_lora().named_parameters() if "lora_A" in n)
    for step in calls:
        assert 1 <= len(step) <= 2
        if len(step) == 2:
            assert step[0][0] * step[0][1] <= whole


def big_pairs(layers: int = 6, experts: int = 4, width: int = 512, rank: int = 8) -> list[nn.Parameter]:
    params = []
    for i in range(layers):
        A, B = (nn.Parameter(torch.randn(experts, width, rank)) for _ in range(2))
        tag_pair(LoraPair(f"layer{i}", experts, rank), A, B)
        params += [A, B]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes allocated at any moment of the call, beyond those at its beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


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
