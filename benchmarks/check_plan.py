"""The planner's time of one adapted layer beside the measured one, on this machine.

    torchrun --nproc_per_node 2 benchmarks/check_plan.py --calibration FILE

FILE is what bench_expert_parallel.py wrote on the same machine: collectives and FLOP/s. The prediction uses nothing
else. Measured: forward and backward of y = W x + mixture(x) with W frozen and x requiring gradients, float32, on as
many expert-parallel ranks as torchrun starts; a repetition takes as long as its slowest rank, the median is shown. The
last line says what matters for choosing: how much slower than the best dispatch the one is that the planner takes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ds_moelora import MoELoRAConfig
from ds_moelora.adapters.layer import MoELoRALayer
from ds_moelora.planning import Choice, Hardware, Workload, hardware, layer_time, load_calibration

HEADER = ("E, k, r", "tokens", "features", "compute", "moves", "planned ms", "measured ms", "planned / measured")
DISPATCHES = ("weights", "tokens")


class Sizes(NamedTuple):
    """One adapted layer, features in = out; tokens per rank."""

    num_experts: int
    top_k: int
    rank: int
    tokens: int
    features: int


SIZES = [
    Sizes(16, 2, 8, 512, 512),
    Sizes(16, 2, 8, 512, 1024),
    Sizes(64, 2, 8, 256, 512),
    Sizes(64, 2, 16, 1024, 768),
    Sizes(128, 2, 16, 64, 512),
]


def build(sizes: Sizes, dispatch: str, compute: str) -> MoELoRALayer:
    """The layer, on the expert-parallel group of all ranks."""
    config = MoELoRAConfig(
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        r=sizes.rank,
        init_lora_weights=False,
        ep_size=dist.get_world_size(),
        ep_dispatch=dispatch,
        expert_compute=compute,
    )
    base = nn.Linear(sizes.features, sizes.features).requires_grad_(False)
    layer = MoELoRALayer(base, "default", config, "layer")
    shard: Any = layer.experts("default").experts_shard()
    shard.set_deepspeed_parallelism()
    return layer.train()


def measured_seconds(layer: nn.Module, sizes: Sizes, repetitions: int) -> float:
    """Median seconds of forward and backward on the slowest rank, after two for warming up."""
    x, seconds = torch.randn(sizes.tokens, sizes.features, requires_grad=True), []
    for _ in range(repetitions + 2):
        dist.barrier()
        start = time.perf_counter()
        layer(x).sum().backward()
        elapsed = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        seconds.append(elapsed.item())
    return statistics.median(seconds[2:])


def planned_seconds(sizes: Sizes, dispatch: str, compute: str, machine: Hardware) -> float:
    """What the planner expects."""
    work = Workload(
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        rank=sizes.rank,
        gpus=dist.get_world_size(),
        sequence_length=sizes.tokens,
        dtype="fp32",
        checkpointing=False,
        expert_compute=compute,
    )
    way = Choice(stage=0, ep_size=dist.get_world_size(), dispatch=dispatch)
    return layer_time(sizes.features, sizes.features, work, way, machine).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    machine = load_calibration(args.calibration, hardware())
    deepspeed.init_distributed()
    torch.manual_seed(dist.get_rank())
    show = print if dist.get_rank() == 0 else lambda *_: None
    show(f"{dist.get_world_size()} ranks; {machine.name}; torch {torch.__version__}")
    show("| " + " | ".join(HEADER) + " |\n|---|---:|---:|---|---|---:|---:|---:|")
    ratios, regrets = [], []
    for sizes, compute in itertools.product(SIZES, ("dense", "grouped")):
        planned = [planned_seconds(sizes, dispatch, compute, machine) for dispatch in DISPATCHES]
        measured = [measured_seconds(build(sizes, d, compute), sizes, args.repetitions) for d in DISPATCHES]
        for dispatch, expected, found in zip(DISPATCHES, planned, measured, strict=True):
            first = f"| {sizes.num_experts}, {sizes.top_k}, {sizes.rank} | {sizes.tokens} | {sizes.features} "
            times = f"| {1e3 * expected:.2f} | {1e3 * found:.2f} | {expected / found:.2f} |"
            show(f"{first}| {compute} | {dispatch} {times}")
            ratios.append(expected / found)
        regrets.append(measured[planned.index(min(planned))] / min(measured) - 1)
    show(f"planned / measured: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    right = sum(regret == 0 for regret in regrets)
    show(f"the planner's dispatch is the faster one in {right} of {len(regrets)}; at worst {max(regrets):.0%} slower")


if __name__ == "__main__":
    main()
