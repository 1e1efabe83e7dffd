"""What experts from singular values cost before training starts: seconds, accuracy, ranks, and quantised residuals.

    python benchmarks/bench_svd.py [--sizes 768x768 1024x4096 ...] [--ranks 1 2] [--layers 8] [--repeats 3]
                                   [--output benchmarks/results/svd.csv]

Three tables, one row per line of the CSV, with hardware, versions, date and command in every row:

    layer    seconds (best of --repeats) to find the triplets of one weight, relative to torch.linalg.svd in float32,
             and the errors of singular values and of experts' products against torch.linalg.svd in float64
    ranks    seconds for a model of --layers weights of the last size, spread over processes of one thread each
    requant  what quantising the residual again would lose (bitsandbytes, where installed)

Weights are Gaussian ("flat") or have singular values k^-1/2 ("decaying", as trained weights have).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch import Tensor, nn

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.goat import mean_product, starting_factors, triplet_indices
from ds_moelora.mixture.svd import Triplets, singular_triplets

EXPERTS, RANK, SCALING, RHO = 8, 4, 2.0, 10.0
VARIANTS = ("goat", "pissa", "milora")
COLUMNS = ["table", "weight", "spectrum", "variant", "algorithm"]
COLUMNS += ["seconds", "relative_time", "error_S", "error_experts"]


def draw(shape: tuple[int, int], spectrum: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    if spectrum == "decaying":
        n = min(shape)
        left, right = (torch.linalg.qr(torch.randn(size, n, generator=generator)).Q for size in shape)
        W = (left * torch.arange(1.0, n + 1) ** -0.5) @ right.T
    return W


def best(repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    seconds, result = float("inf"), None
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, result


def errors(found: Triplets, exact: Triplets) -> tuple[float, float]:
    """Largest relative error of a singular value; of an expert's product, relative to the largest product."""
    of_S = ((found.S - exact.S).abs() / exact.S).max().item()
    products = []
    for triplets in (found, exact):
        A, B = starting_factors(triplets, EXPERTS, SCALING, RHO)
        products.append(torch.einsum("eor,eir->eoi", B, A))
    return of_S, ((products[0] - products[1]).norm(dim=(1, 2)).max() / products[1].norm(dim=(1, 2)).max()).item()


def layer_rows(shape: tuple[int, int], spectrum: str, repeats: int) -> list[dict[str, Any]]:
    W, rows = draw(shape, spectrum), []
    full_seconds, full = best(repeats, lambda: torch.linalg.svd(W, full_matrices=False))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)

    def add(variant: str, algorithm: str, seconds: float, found: Triplets, exact: Triplets) -> None:
        of_S, of_products = errors(found, exact)
        rows.append(
            {
                "table": "layer",
                "weight": f"{shape[0]}x{shape[1]}",
                "spectrum": spectrum,
                "variant": variant,
                "algorithm": algorithm,
                "seconds": seconds,
                "relative_time": seconds / full_seconds,
                "error_S": of_S,
                "error_experts": of_products,
            }
        )

    for variant in VARIANTS:
        indices = triplet_indices(min(shape), EXPERTS, RANK, variant).flatten()
        exact = Triplets(U[:, indices], S[indices], Vh[indices].T)
        single = Triplets(*(t.double() for t in (full[0][:, indices], full[1][indices], full[2][indices].T)))
        add(variant, "full fp32", full_seconds, single, exact)
        seconds, found = best(repeats, lambda i=indices: singular_triplets(W, i))
        add(variant, "gram", seconds, found, exact)
    return rows


class Layers(nn.Module):
    """Equal layers one after the other."""

    def __init__(self, count: int, shape: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(shape[1], shape[0], bias=False) for _ in range(count))


def start_model(rank: int, world: int, store: str, count: int, shape: tuple[int, int], results: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = Layers(count, shape)
    names = [f"layers.{i}" for i in range(count)]
    config = MoELoRAConfig(init_lora_weights="goat", num_experts=EXPERTS, r=RANK, target_modules=names)
    if world > 1:
        dist.barrier()
    started = time.perf_counter()
    get_peft_model(model, config)
    if world > 1:
        dist.barrier()
    if rank == 0:
        Path(results).write_text(str(time.perf_counter() - started))


def rank_rows(worlds: list[int], count: int, shape: tuple[int, int]) -> list[dict[str, Any]]:
    rows = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (world, f"{folder}/store", count, shape, f"{folder}/seconds")
            mp.spawn(start_model, arguments, nprocs=world)
            seconds = float(Path(f"{folder}/seconds").read_text())
        weight = f"{count} of {shape[0]}x{shape[1]}"
        row = {"table": "ranks", "weight": weight, "spectrum": "flat", "variant": "goat", "algorithm": f"{world} ranks"}
        rows.append({**row, "seconds": seconds, "relative_time": seconds / (rows[0]["seconds"] if rows else seconds)})
    return rows


def requantised_rows(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Relative to what the residual takes away: 1 would mean that as much is lost as was meant to be subtracted."""
    import bitsandbytes.functional as bnb

    def nf4(W: Tensor) -> Tensor:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(W.contiguous(), quant_type="nf4"))

    def int8(W: Tensor) -> Tensor:
        codes, scales, _ = bnb.int8_vectorwise_quant(W.to(torch.float16))
        return bnb.int8_vectorwise_dequant(codes, scales).float()

    rows = []
    for name, quantise in (("nf4", nf4), ("int8", int8)):
        for spectrum in ("flat", "decaying"):
            W0 = quantise(draw(shape, spectrum))
            indices = triplet_indices(min(shape), EXPERTS, RANK, "goat").flatten()
            A, B = starting_factors(singular_triplets(W0, indices), EXPERTS, SCALING, RHO)
            given = mean_product(A, B, SCALING).float()
            lost = quantise(W0 - given) - (W0 - given)
            common = {"table": "requant", "weight": f"{shape[0]}x{shape[1]}", "spectrum": spectrum, "variant": "goat"}
            rows.append({**common, "algorithm": name, "error_experts": (lost.norm() / given.norm()).item()})
    return rows


def environment() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    found = importlib.util.find_spec("bitsandbytes") is not None
    with_bitsandbytes = f", bitsandbytes {importlib.metadata.version('bitsandbytes')}" if found else ""
    return {
        "hardware": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}{with_bitsandbytes}, python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1024x1024", "2048x1024"], help="out x in")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layers", type=int, default=8, help="weights of the last size in the table of ranks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/svd.csv")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    shapes: list[Any] = [tuple(map(int, size.split("x"))) for size in args.sizes]
    drawn = itertools.product(shapes, ("flat", "decaying"))
    rows = [row for shape, spectrum in drawn for row in layer_rows(shape, spectrum, args.repeats)]
    rows += rank_rows(args.ranks, args.layers, shapes[-1])
    if importlib.util.find_spec("bitsandbytes") is not None:
        rows += requantised_rows(shapes[-1])
    about = environment()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in {**row, **about}.items()})
    print(
        f"{'table':8}{'weight':16}{'spectrum':10}{'variant':8}{'algorithm':11}{'s':>8}{'rel.':>7}{'S':>9}{'experts':>9}"
    )
    for row in rows:
        numbers = [row.get(c) for c in COLUMNS[5:]]
        shown = ["" if n is None else f"{n:.2g}" for n in numbers]
        print(
            f"{row['table']:8}{row['weight']:16}{row['spectrum']:10}{row['variant']:8}{row['algorithm']:11}"
            f"{shown[0]:>8}{shown[1]:>7}{shown[2]:>9}{shown[3]:>9}"
        )


if __name__ == "__main__":
    main()
