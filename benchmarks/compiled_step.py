"""What the compiled optimizer step's time goes to: its kernels, and the rest, beside torch's fused AdamW.

    OMP_NUM_THREADS=1 python -m benchmarks.compiled_step

112 modules of two (20, 1024, 4) factors, as in bench_optimizer.py; milliseconds, medians over steps in turn.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch

from ds_moelora import GateRiemannianAdamW
from ds_moelora.core.kernels import Kernels

from .bench_gpu import tagged_factors
from .harness import hardware, measure
from .layers import Size


class TimedKernels(Kernels):
    """Kernels that note how long each call takes: name -> seconds."""

    seconds: defaultdict[str, list[float]]

    def _call(self, name: str, *operands: Any) -> None:
        start = time.perf_counter()
        super()._call(name, *operands)
        self.seconds[name].append(time.perf_counter() - start)


def main() -> None:
    print(f"torch {torch.__version__}, {hardware()}")
    size, modules = Size(20, 10, 4, 1024, 1024, 0), 112
    ours, theirs = (tagged_factors(modules, size, "cpu") for _ in range(2))
    optimizer = GateRiemannianAdamW(ours, lr=1e-4, compiled=True)
    kernels = optimizer._kernels
    assert kernels is not None
    kernels.__class__, kernels.seconds = TimedKernels, defaultdict(list)  # type: ignore[attr-defined]
    steps = {"compiled": optimizer.step, "torch's fused AdamW": torch.optim.AdamW(theirs, lr=1e-4, fused=True).step}
    medians = {name: statistics.median(seconds) for name, seconds in measure(steps, rounds=15).items()}
    parts = {name: statistics.median(seconds) for name, seconds in kernels.seconds.items()}  # type: ignore[attr-defined]
    rest = medians["compiled"] - sum(parts.values())
    for name, seconds in {**medians, **parts, "rest of the compiled step": rest}.items():
        print(f"{name:28s} {seconds * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
