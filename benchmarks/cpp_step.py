"""What the time of an optimizer step with C++ kernels goes to: the kernels, and the rest, beside torch's fused AdamW.

    OMP_NUM_THREADS=1 python -m benchmarks.cpp_step

112 modules of two (20, 1024, 4) factors, as in bench_optimizer.py; milliseconds, medians over steps in turn.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any
from unittest import mock

import torch

from ds_moelora import GateRiemannianAdamW
from ds_moelora.optimizer.kernels.cpp import CppKernels

from .bench_gpu import tagged_factors
from .harness import hardware, measure
from .layers import Size


def main() -> None:
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    call = CppKernels._call

    def timed(self: CppKernels, name: str, *operands: Any) -> None:
        start = time.perf_counter()
        call(self, name, *operands)
        seconds[name].append(time.perf_counter() - start)

    print(f"torch {torch.__version__}, {hardware()}")
    size, modules = Size(20, 10, 4, 1024, 1024, 0), 112
    ours, theirs = (tagged_factors(modules, size, "cpu") for _ in range(2))
    optimizer = GateRiemannianAdamW(ours, lr=1e-4, kernels="cpp")
    steps = {"cpp": optimizer.step, "torch's fused AdamW": torch.optim.AdamW(theirs, lr=1e-4, fused=True).step}
    with mock.patch.object(CppKernels, "_call", timed):
        medians = {name: statistics.median(found) for name, found in measure(steps, rounds=15).items()}
    parts = {name: statistics.median(found) for name, found in seconds.items()}
    rest = medians["cpp"] - sum(parts.values())
    for name, found in {**medians, **parts, "rest of that step": rest}.items():
        print(f"{name:28s} {found * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
