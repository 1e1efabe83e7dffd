"""The exchange of a step, on processes that are threads: whole, the same bits everywhere, no more than is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.step_cost import LAYERS, Shape, cost, factors_of, places_of, plan_of, planning
from ds_moelora.optimizer.kernels.rows import Kernels
from ds_moelora.optimizer.sharding import transfer
from ds_moelora.optimizer.sharding.exchange import ShardedPreconditioner
from ds_moelora.optimizer.sharding.transfer import Transfer


class Threads:
    """`torch.distributed` for one thread per process."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.given = world, threading.Barrier(world, timeout=60), [None] * world
        self.local = threading.local()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None] * self.world

        def target(process: int) -> None:
            self.local.process = process
            try:
                found[process] = function(process)
            except BaseException as error:
                found[process] = error
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(q,)) for q in range(self.world)]
        for function_of in ("start", "join"):
            for thread in threads:
                getattr(thread, function_of)()
        for result in found:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return found

    def _all(self, mine: Any) -> list[Any]:
        self.given[self.local.process] = mine
        self.barrier.wait()
        every = list(self.given)
        self.barrier.wait()
        return every

    def all_reduce(self, tensor: Tensor, group: Any) -> None:
        tensor.copy_(torch.stack(self._all(tensor.clone())).sum(0))

    def all_to_all_single(self, received: Tensor, sent: Tensor, sizes: list[int], to: list[int], group: Any) -> None:
        every = self._all(sent.split(to))
        mine = [parts[self.local.process] for parts in every]
        assert [len(part) for part in mine] == sizes
        received.copy_(torch.cat(mine))


def preconditioned(
    shapes: Sequence[Shape],
    world: int,
    stage: int,
    gradient_grams: bool,
    direct: bool | None,
    kernels: Kernels | None = None,
) -> list[Tensor]:
    """The gradients after the step of `world` processes; those that share an expert must see the same bits of it."""
    factors = factors_of(shapes)
    generator = torch.Generator().manual_seed(1)
    numels = [f.param.numel() for f in factors]
    whole = [torch.randn(2, n, generator=generator, dtype=torch.float64) for n in numels]
    threads = Threads(world)

    def step(process: int) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        places = places_of(factors, process, world, stage, group=threads if world > 1 else None)
        numel = max((p.local_offset + p.stop - p.start for p in places), default=0)
        flats = torch.zeros(2, numel, dtype=torch.float32 if kernels else torch.float64)
        for p, values in zip(places, whole, strict=True):
            flats[:, p.local_offset : p.local_offset + p.stop - p.start] = values[:, p.start : p.stop]
        seen: dict[tuple[int, int], Tensor] = {}

        def matrices(grams: Tensor, of_gradients: Tensor | None, damping: Any) -> Tensor:
            total = grams + damping * torch.eye(grams.shape[-1]) + (0 if of_gradients is None else of_gradients)
            seen[grams.shape[-1], len(seen)] = total
            return torch.linalg.inv(total)

        step = ShardedPreconditioner(
            factors,
            places,
            lambda unit: (flats[0], flats[1]),
            matrices,
            lambda i: (0.5,),
            gradient_grams,
            kernels=kernels,
        )
        step({0})
        (plan,) = step._plans.values()
        by_expert = {}
        for (rank, _), total in seen.items():
            numbers = plan.grads.order[rank]
            experts = [(i, e) for i in numbers for e in plan._experts(i)]
            assert len(experts) == len(total) == plan.grads.num[rank]
            by_expert |= dict(zip(experts, total, strict=True))
        return [flats[1, p.local_offset : p.local_offset + p.stop - p.start] for p in places], by_expert

    with mock.patch.object(transfer, "dist", threads):
        if direct is None:
            found = threads.run(step)
        else:
            with mock.patch.object(Transfer, "is_direct", direct):
                found = threads.run(step)
    first: dict[tuple[int, int], Tensor] = {}
    for _, by_expert in found:
        for expert, matrix in by_expert.items():
            assert torch.equal(first.setdefault(expert, matrix), matrix)
    return [torch.cat(parts) for parts in zip(*(gradients for gradients, _ in found), strict=True)]


shape = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.booleans())


@given(
    shapes=st.lists(shape, min_size=1, max_size=4),
    world=st.integers(2, 5),
    stage=st.sampled_from([2, 3]),
    gradient_grams=st.booleans(),
    direct=st.sampled_from([True, False, None]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_sharded_equals_whole_by_either_collective(
    shapes: list[Shape], world: int, stage: int, gradient_grams: bool, direct: bool | None
) -> None:
    sharded = preconditioned(shapes, world, stage, gradient_grams, direct)
    whole = preconditioned(shapes, 1, stage, gradient_grams, None)
    for ours, expected in zip(sharded, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_parts_are_added_in_one_order() -> None:
    """Float sums depend on their order: a process that began with its own part would differ here."""
    shapes: list[Shape] = [(701, 3, 1, 2, False)]
    for stage in (2, 3):
        preconditioned(shapes, 5, stage, False, True)


@pytest.mark.parametrize("stage", [2, 3])
def test_work_and_memory_fall_with_the_processes(stage: int, report: Callable[[str, str], None]) -> None:
    one, all_grams = cost(LAYERS, 1, stage), 2 * sum(experts for _, _, experts, _, _ in LAYERS)
    assert (one.inverted, one.summed, one.sent) == (all_grams, all_grams, 0)
    for world in (2, 4, 8):
        found = cost(LAYERS, world, stage)
        report("Riemannian step of one process", f"stage {stage} world {world}: {found}; {all_grams} Gram matrices")
        # ZeRO-2: narrow layers have more Gram matrices for their size. ZeRO-3: an expert that a boundary cuts.
        assert found.inverted <= found.summed <= 1.5 * all_grams / world
        # Each shared matrix: one triangle to one other process; before, an all-reduce of all of them.
        rank = LAYERS[0][3]
        assert found.sent <= 4 * (found.summed * rank * (rank + 1) // 2 + 4 * rank * len(LAYERS))
        assert found.sent < 2 * (world - 1) / world * 4 * all_grams * rank**2 / 4
        assert stage < 3 or found.peak <= 1.6 * one.peak / world


def test_few_processes_want_what_all_have() -> None:
    """A single expert at ZeRO-3 is everybody's: an all-reduce. Experts cut in a few parts: direct."""
    for experts, direct in ((1, False), (16, True)):
        plan = plan_of(factors_of([(64, 64, experts, 4, False)]), 3, 32, 3)
        assert plan.exchange.is_direct is direct


def test_planning_for_a_thousand_processes() -> None:
    seconds, megabytes = planning(1024, 3)
    assert seconds < 10  # of CPU time; 1.5 on a quiet machine
    assert megabytes < 200
