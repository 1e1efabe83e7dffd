"""What a cost model needs to know: latency and time per byte of a group's collectives, and the speed of products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def calibrate(sizes: tuple[int, ...] = (2**10, 2**14, 2**17, 2**20), repetitions: int = 9) -> dict[str, Any]:
    """Latency and seconds per byte that a rank sends, by collective; and floating-point operations per second."""
    ranks = dist.get_world_size()
    collectives = {}
    for name in ("all_gather", "reduce_scatter", "all_to_all"):
        points = [(elements * 4 * (ranks - 1), _collective(name, elements, repetitions)) for elements in sizes]
        collectives[name] = _line(points)
    flops = {name: _flops_per_second(name, repetitions) for name in ("dense", "grouped")}
    return {"collectives": collectives, "flops_per_second": flops}


def _collective(name: str, elements: int, repetitions: int) -> float:
    """Median seconds in which every rank sends `elements` floats to each of the others."""
    ranks = dist.get_world_size()
    small, large = torch.zeros(elements), torch.zeros(ranks * elements)
    call = {
        "all_gather": lambda: dist.all_gather_into_tensor(large, small),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(small, large),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(large), large),
    }[name]
    return _median(call, repetitions)


def _median(call: Callable[[], Any], repetitions: int) -> float:
    times = []
    for _ in range(1 + repetitions):
        dist.barrier()
        start = time.perf_counter()
        call()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        times.append(seconds.item())
    return float(torch.tensor(times[1:]).median())


def _line(points: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds = latency + bytes * seconds_per_byte, fitted with equal relative weights; latency at least 0."""
    size, seconds = torch.tensor(points, dtype=torch.float64).unbind(1)
    ones = torch.ones_like(size)
    solution = torch.linalg.lstsq(torch.stack([ones, size], 1) / seconds[:, None], ones[:, None]).solution
    latency, per_byte = solution.flatten().clamp(min=0).tolist()
    return {"latency_s": latency, "seconds_per_byte": per_byte}


def _flops_per_second(
    name: str, repetitions: int, T: int = 512, F: int = 512, E: int = 32, k: int = 2, r: int = 8
) -> float:
    """Of the mixture's products, forward and backward, on all ranks at once.

    dense: 3 * 2 T E r (in + out); grouped: 3 * 2 T k r (in + out), copies and the loop over experts counted as time.
    """
    from ds_moelora.mixture.dense import DENSE
    from ds_moelora.mixture.grouped import GROUPED
    from ds_moelora.mixture.mixture import mix
    from ds_moelora.mixture.operands import Operands
    from ds_moelora.mixture.routing import route

    x, A, B = (torch.randn(*shape).requires_grad_() for shape in ((T, F), (E, F, r), (E, F, r)))
    gates = route(torch.randn(T, E).requires_grad_(), k)
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=1.0, gates=gates)
    products = {"dense": DENSE, "grouped": GROUPED}[name]

    def call() -> None:
        y = mix(operands, torch.zeros(T, F), products=products).y
        torch.autograd.grad(y, [x, gates, A, B], y.detach(), retain_graph=True)

    return 3 * 2 * T * (E if name == "dense" else k) * r * 2 * F / _median(call, repetitions)
