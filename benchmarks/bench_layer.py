"""The adapted layer against its floor, its bound and the published form, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_layer [--heap kept] [--short]

Mode "train": forward and backward, with gradients for x. Mode "decode": one token, forward alone, without autograd.
Ratios are to the frozen base layer; `over_peft` is the ratio to PEFT's LoRA of rank E*r, `bound` the FLOP bound, both
as multiples of the same. `saved_mb`: kept for backward beside x and the weights; `peak_mb`: the most that is allocated
at once during a step. `auto` marks the `expert_compute` that "auto" takes; `added` is the time that a layer adds to the
base layer's, as a multiple of what PEFT's adds.

Left out, since they would take many minutes each: float32 with 8192 tokens at 3072 x 8192, and the loop but for 512
tokens or E, k, r = 20, 10, 4 at 1024 x 1024.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ds_moelora.mixture.choice import choose_products

from .harness import Results, arguments, measure, peak_bytes, ratio, saved_bytes, set_heap
from .layers import Size, contenders, decoding_step, training_step

CASE = ("mode", "dtype", "experts", "top_k", "rank", "in_features", "out_features", "tokens", "heap")
EXTRAS = ("bound", "over_peft", "added", "auto", "saved_mb", "peak_mb")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_FLOPS = {"float32": 4e11, "bfloat16": 1e12}
MIXTURES = ((20, 10, 4), (8, 2, 4), (64, 4, 8), (64, 2, 16))
FEATURES = ((1024, 1024), (3072, 3072), (3072, 8192))
TOKENS = (512, 2048, 8192)
SWEEPS = [
    *(Size(experts, 2, 4, 1024, 1024, 2048) for experts in (2, 4, 16, 32, 64, 128)),
    *(Size(8, 2, rank, 1024, 1024, 2048) for rank in (1, 2, 8, 16, 32, 64)),
    *(Size(20, 10, 4, 1024, 1024, tokens) for tokens in (128, 256, 1024, 4096)),
]


def cases(short: bool, heap: str) -> Iterator[tuple[str, str, Size]]:
    """(mode, dtype, size). With the kept heap the cases of one shape; its effect is on temporaries."""
    if short:
        yield from (("train", dtype, Size(20, 10, 4, 1024, 1024, 2048)) for dtype in DTYPES)
        yield from (("train", "float32", Size(*mixture, 1024, 1024, 512)) for mixture in MIXTURES[1:])
        yield from (("decode", dtype, Size(20, 10, 4, 1024, 1024, 1)) for dtype in DTYPES)
        return
    for dtype in DTYPES:
        for features in FEATURES[:1] if heap == "kept" else FEATURES:
            for mixture in MIXTURES[:1] if heap == "kept" else MIXTURES:
                yield "decode", dtype, Size(*mixture, *features, 1)
                for size in (Size(*mixture, *features, tokens) for tokens in TOKENS):
                    if size.base_flops <= MOST_FLOPS[dtype]:
                        yield "train", dtype, size
    if heap == "default":
        yield from (("train", "float32", size) for size in SWEEPS)


def run(mode: str, dtype: str, size: Size) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Samples of all contenders of a case, and their extra columns."""
    loop = size.tokens <= 512 or (size.experts, size.in_features) == (20, 1024)
    layers = contenders(size, DTYPES[dtype], loop=loop)
    x = torch.randn(1, size.tokens, size.in_features).to(DTYPES[dtype]).requires_grad_(mode == "train")
    dy = torch.randn(1, size.tokens, size.out_features).to(DTYPES[dtype])
    if mode == "train":
        steps = {name: training_step(layer, x, dy) for name, layer in layers.items()}
    else:
        steps = {name: decoding_step(layer, x) for name, layer in layers.items()}
    samples = measure(steps, rounds=(5, 15, 4.0))
    added = {name: statistics.median(seconds) - statistics.median(samples["base"]) for name, seconds in samples.items()}
    auto = choose_products("auto", size.experts, size.top_k, size.rank, DTYPES[dtype]).name
    extras: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        extras[name] = {
            "bound": f"{size.bound:.4f}",
            "over_peft": f"{ratio(samples, name, 'peft')[1]:.4f}",
            "added": f"{added[name] / added['peft']:.3f}",
            "auto": "yes" if name == auto else "",
        }
        if mode == "train":
            saved = saved_bytes(partial(layer, x), [x, *layer.parameters()])
            extras[name]["saved_mb"] = f"{saved / 1e6:.4f}"
            extras[name]["peak_mb"] = f"{peak_bytes(steps[name]) / 1e6:.3f}"
    return samples, extras


def main() -> None:
    args = arguments(__doc__, "layer").parse_args()
    set_heap(args.heap)
    results = Results(args.output, CASE, EXTRAS, args.fresh)
    start = time.monotonic()
    for mode, dtype, size in cases(args.short, args.heap):
        case = {"mode": mode, "dtype": dtype, **vars(size), "heap": args.heap}
        if results.has(case):
            continue
        if time.monotonic() - start > args.seconds:
            print(f"stopped after {args.seconds:g} s; the same command goes on from here")
            break
        samples, extras = run(mode, dtype, size)
        results.add(case, "base", samples, extras)


if __name__ == "__main__":
    main()
