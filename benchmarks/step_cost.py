"""What one process does in an optimizer step, by the number of processes: Gram matrices, bytes sent, memory, planning.

  python -m benchmarks.step_cost                 # the table of docs/optimizer.md: worlds 1, 2, 4, 8
  python -m benchmarks.step_cost --plan          # building the plan of one of 1,024 processes: 560 layers, 64 experts

Counted from the plans of all processes, without starting one; the peak is measured while the process with most Gram
matrices runs its part, with collectives that move nothing.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from ds_moelora.optimizer import preconditioner
from ds_moelora.optimizer.factors import Factor
from ds_moelora.optimizer.sharding import transfer
from ds_moelora.optimizer.sharding.exchange import ShardedPreconditioner
from ds_moelora.optimizer.sharding.placement import Placement
from ds_moelora.optimizer.sharding.plan import StepPlan
from ds_moelora.pairs import LoraPair

Shape = tuple[int, int, int, int, bool]  # in, out, experts, rank, stored as PEFT does
# Attention and MLP of a small Llama, 12 experts of rank 16.
LAYERS: list[Shape] = [(i, o, 12, 16, False) for i, o in [(512, 512), (512, 512), (512, 1408), (1408, 512)] * 4]


def factors_of(shapes: Sequence[Shape]) -> list[Factor]:
    """A and B of every layer."""
    factors: list[Factor] = []
    for k, (*widths, experts, rank, as_peft) in enumerate(shapes):
        pair = LoraPair(f"layer{k}", experts, rank, rank_first_A=as_peft)
        for role, width in zip("AB", widths, strict=True):
            param = nn.Parameter(torch.empty(experts * width * rank, device="meta"))
            factors.append(Factor(param, pair, role, 0, len(factors) + 1 - 2 * (role == "B")))
    return factors


def places_of(factors: Sequence[Factor], process: int, world: int, stage: int, group: Any = None) -> list[Placement]:
    """As ZeRO-2 lays them out, in one buffer, or as ZeRO-3 does: each of them cut into equal parts."""
    numels, places, position, local = [f.param.numel() for f in factors], [], 0, 0
    for numel in numels:
        partition = -(-(sum(numels) if stage < 3 else numel) // world)
        here = (position, max(position - process * partition, 0)) if stage < 3 else (0, local)
        places.append(
            Placement(
                numel=numel,
                unit=0,
                position=here[0],
                partition=partition,
                local_offset=here[1],
                process=process,
                world=world,
                group=group,
            )
        )
        position, local = position + numel, local + partition
    return places


def plan_of(factors: Sequence[Factor], process: int, world: int, stage: int, gradient_grams: bool = False) -> StepPlan:
    """One process's plan of a step of all factors."""
    every = list(range(len(factors)))
    return StepPlan(factors, places_of(factors, process, world, stage), every, every, gradient_grams)


class Cost(NamedTuple):
    """Of the process that has most of it; bytes."""

    inverted: int  # Gram matrices
    summed: int  # Gram matrices that it keeps, for itself or others
    sent: int
    collective: str
    peak: int


def cost(shapes: Sequence[Shape], world: int, stage: int) -> Cost:
    """One step's, over all processes."""
    factors = factors_of(shapes)
    plans = [plan_of(factors, process, world, stage) for process in range(world)]
    inverted = [sum(plan.grads.num.values()) for plan in plans]
    summed = [sum(plan.weights.sums.values()) for plan in plans]
    exchange = plans[0].exchange
    collective = ("all_to_all" if exchange.is_direct else "all_reduce") if exchange.numel else "none"
    busiest = max(range(world), key=summed.__getitem__)
    sent = max(4 * elements_sent(plan.exchange) for plan in plans)
    return Cost(max(inverted), max(summed), sent, collective, peak(factors, busiest, world, stage))


def elements_sent(exchange: transfer.Transfer) -> int:
    """By this process; an all-reduce as on a ring."""
    world = exchange.world
    return sum(exchange.sent_to) if exchange.is_direct else round(2 * (world - 1) / world * exchange.numel)


def peak(factors: Sequence[Factor], process: int, world: int, stage: int) -> int:
    """Most bytes that one process's part of a step allocates, as on a GPU, beside weights and gradients."""
    places = places_of(factors, process, world, stage)
    flats = torch.randn(2, max(place.local_offset + place.stop - place.start for place in places))

    def matrices(grams: Tensor, _: Any, damping: Any) -> Tensor:
        return preconditioner.damped_inverse(grams, damping)

    step = ShardedPreconditioner(factors, places, lambda unit: (flats[0], flats[1]), matrices, lambda i: (1e-6,))
    # On a GPU both attempts at an inverse are made, always.
    with mock.patch.object(transfer, "dist"), mock.patch.object(preconditioner, "on_host", return_value=False):
        step({0})  # makes the plan
        return peak_bytes(lambda: step({0}))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes allocated at any moment of the call, beyond those at its beginning."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def planning(world: int, stage: int) -> tuple[float, float]:
    """CPU seconds and MB of a plan, and of the routes of its exchange: 560 layers of 64 experts, rank 16."""
    shapes: list[Shape] = [(i, o, 64, 16, False) for i, o in [(8192, 8192), (8192, 1024), (8192, 28672)] * 187][:560]
    factors = factors_of(shapes)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = plan_of(factors, world // 2, world, stage)
    assert elements_sent(plan.exchange) >= 0  # builds the routes
    seconds = time.process_time() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="time the planning instead")
    if parser.parse_args().plan:
        for stage in (2, 3):
            print("stage {}: {:.1f} s, {:.0f} MB".format(stage, *planning(1024, stage)))
        return
    print("| ZeRO | processes | inverted | summed | sent, bytes | by | peak, MB |\n|---|---|---|---|---|---|---|")
    for stage in (2, 3):
        for world in (1, 2, 4, 8):
            found = cost(LAYERS, world, stage)
            numbers = (
                f"{found.inverted} | {found.summed} | {found.sent:,} | {found.collective} | {found.peak / 1e6:.2f}"
            )
            print(f"| {stage} | {world} | {numbers} |")


if __name__ == "__main__":
    main()
