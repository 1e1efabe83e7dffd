"""What `bench_expert_parallel.py` runs on every rank: one adapted layer, by each way and by DeepSpeed's own MoE layer.

Every case is y = W x + mixture(x) with W frozen, features in = out, float32, forward and backward. Cases of one point
of the grid run interleaved; a repetition takes as long as its slowest rank.
"""

from __future__ import annotations

import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from expert_parallel_calibration import calibrate
from torch import Tensor, nn

WAYS = [(dispatch, compute) for dispatch in ("weights", "tokens") for compute in ("dense", "grouped")]
NO_DROP, DEFAULTS = "DeepSpeed MoE, drop_tokens=False", "DeepSpeed MoE, defaults"


@dataclass(frozen=True)
class Point:
    """One point of the grid: E experts on `ep` ranks, k chosen, rank r, tokens per rank, features in = out."""

    ep: int
    E: int
    k: int
    r: int
    tokens: int
    features: int
    in_windows: bool = False  # a stack of `LAYERS` layers instead, gathered each by itself and several at once


LAYERS = 12
RESULTS = "results.pickle"
MIN_REPETITIONS = 9


@dataclass
class Result:
    """Seconds of every repetition; bytes that a rank sends, counted at the collectives (mean over the ranks)."""

    case: str
    seconds: list[float] = field(default_factory=list)
    sent: float = 0.0
    collectives: int = 0
    dropped: float = 0.0  # share of (token, expert) choices that were dropped


class Counter:
    """Counts what this rank sends to others, at torch.distributed's own functions."""

    def __init__(self) -> None:
        self.sent, self.calls = 0.0, 0

    # Parameters are called as in torch.distributed, whose callers name them.

    def all_gather_into_tensor(self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, **_: Any) -> float:
        return input_tensor.nbytes * (dist.get_world_size(group) - 1)

    def reduce_scatter_tensor(self, output: Tensor, input: Tensor, group: Any = None, **_: Any) -> float:
        ranks = dist.get_world_size(group)
        return input.nbytes * (ranks - 1) / ranks

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        **_: Any,
    ) -> float:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if not input_split_sizes:
            return input.nbytes * (ranks - 1) / ranks
        elements = input[:1].numel() if len(input) else 0
        return (sum(input_split_sizes) - input_split_sizes[rank]) * elements * input.element_size()

    @contextmanager
    def counting(self) -> Iterator[None]:
        originals = {name: getattr(dist, name) for name in COLLECTIVES}

        def watched(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.sent += getattr(self, name)(*args, **kwargs)
                self.calls += 1
                return originals[name](*args, **kwargs)

            return call

        for name in COLLECTIVES:
            setattr(dist, name, watched(name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)


COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


class LoraExpert(nn.Module):
    """B A x, for DeepSpeed's MoE layer, which wants in = out."""

    def __init__(self, features: int, r: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(features, r) / features), nn.Parameter(torch.randn(r, features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.A @ self.B


class WithMoE(nn.Module):
    """The frozen linear layer beside DeepSpeed's MoE layer."""

    def __init__(self, point: Point, **options: Any) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.base = nn.Linear(point.features, point.features).requires_grad_(False)
        expert = LoraExpert(point.features, point.r)
        self.moe = MoE(point.features, expert, num_experts=point.E, ep_size=point.ep, k=point.k, **options)
        self.moe.set_deepspeed_parallelism()
        self.dropped = 0.0
        self.moe.deepspeed_moe.gate.register_forward_hook(self._see_dropped)

    def _see_dropped(self, module: nn.Module, args: Any, output: Any) -> None:
        self.dropped = (output[3] < 0).float().mean().item()  # evicted choices have a negative expert

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.moe(x)[0]


def adapted(point: Point, dispatch: str, compute: str) -> Any:
    """A `MoELoRALayer` on its expert-parallel group."""
    from ds_moelora import MoELoRAConfig
    from ds_moelora.tuner.layer import MoELoRALayer

    config = MoELoRAConfig(
        r=point.r,
        num_experts=point.E,
        top_k=point.k,
        init_lora_weights=False,
        ep_size=point.ep,
        ep_dispatch=dispatch,
        expert_compute=compute,
    )
    base = nn.Linear(point.features, point.features).requires_grad_(False)
    layer = MoELoRALayer(base, "default", config, "layer")
    layer.experts("default").experts_shard().set_deepspeed_parallelism()
    return layer.train()


def stack(point: Point, window_bytes: int) -> nn.Module:
    """`LAYERS` layers one after the other, whose experts are gathered in windows of so many bytes."""
    from ds_moelora.expert_parallel.gather import Gathers

    model, gathers = nn.Sequential(*(adapted(point, "weights", "dense") for _ in range(LAYERS))), Gathers(window_bytes)
    for layer in model:
        layer.experts("default").experts_shard().gathers = gathers
    gathers.follow(model)
    return model


def cases(point: Point) -> dict[str, nn.Module]:
    if point.in_windows:
        from ds_moelora.expert_parallel.gather import WINDOW_BYTES

        sizes = {"a gather each": 0, "in windows": WINDOW_BYTES}
        return {f"{LAYERS} layers, {name}": stack(point, size) for name, size in sizes.items()}
    modules: dict[str, nn.Module] = {f"{d}, {c}": adapted(point, d, c) for d, c in WAYS}
    modules[NO_DROP] = WithMoE(point, drop_tokens=False)
    modules[DEFAULTS] = WithMoE(point)
    return modules


def step(module: nn.Module, x: Tensor) -> None:
    y = module(x)
    y.backward(torch.ones_like(y))


def timed(module: nn.Module, x: Tensor) -> float:
    """Seconds of forward and backward on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    step(module, x)
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def measure(point: Point, limit: float) -> list[Result]:
    """All cases of a point, on every rank; each repetition in another order, as many as fit into `limit` seconds."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(point.tokens, point.features, generator=generator).requires_grad_()
    modules = cases(point)
    results = {name: Result(name) for name in modules}
    for name, module in modules.items():
        for _ in range(2):  # the order of layers is learned
            step(module, x)
        counter = Counter()
        with counter.counting():
            step(module, x)
        found = torch.tensor([counter.sent, getattr(module, "dropped", 0.0)])
        dist.all_reduce(found)
        results[name].sent, results[name].dropped = (found / dist.get_world_size()).tolist()
        results[name].collectives = counter.calls
    order, shuffle, total = list(modules), random.Random(0), 0.0  # the same on all ranks
    while len(results[order[0]].seconds) < MIN_REPETITIONS or total < limit:
        shuffle.shuffle(order)
        for name in order:
            results[name].seconds.append(timed(modules[name], x))
            total += results[name].seconds[-1]
    return list(results.values())


def serve(rank: int, world: int, folder: str, points: list[Point], limit: float, calibration: bool) -> None:
    """One rank of `torch.multiprocessing.spawn`; rank 0 pickles ([(point, results)], calibration) into `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    import deepspeed

    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("ERROR")
    torch.manual_seed(0)
    measured = []
    for number, point in enumerate(points):
        if rank == 0:
            print(f"{world} ranks, point {number + 1} of {len(points)}: {point}", flush=True)
        measured.append((point, measure(point, limit)))
    found = calibrate() if calibration else None
    if rank == 0:
        Path(folder, RESULTS).write_bytes(pickle.dumps((measured, found)))
    dist.barrier()
    dist.destroy_process_group()
