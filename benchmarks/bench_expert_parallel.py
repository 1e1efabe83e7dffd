"""Bytes moved and time of a layer whose experts lie on several ranks: weights or tokens, and DeepSpeed's MoE.

    OMP_NUM_THREADS=1 python benchmarks/bench_expert_parallel.py          # short grid, below 4 minutes on 2 cores
    OMP_NUM_THREADS=1 python benchmarks/bench_expert_parallel.py --full

Starts real processes (gloo). Writes `benchmarks/results/expert_parallel.csv` (every case of every point of the grid),
`benchmarks/results/expert_parallel_calibration.json` (what a cost model needs; bytes are those that a rank sends) and
`docs/images/expert_parallel_crossing.png` (matplotlib; `pip install -e .[bench]`). Times are medians of
interleaved repetitions in random order, each as long as its slowest rank; 4 ranks on fewer cores are there for their
bytes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.multiprocessing as mp
from expert_parallel_cases import DEFAULTS, LAYERS, NO_DROP, RESULTS, WAYS, Point, Result, serve
from expert_parallel_plot import draw
from rich.console import Console
from rich.table import Table

from ds_moelora.expert_parallel.dispatch import bytes_moved, choose_dispatch
from ds_moelora.expert_parallel.spec import ShardSpec
from ds_moelora.mixture.choice import choose_products

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks" / "results" / "expert_parallel.csv"
CALIBRATION = ROOT / "benchmarks" / "results" / "expert_parallel_calibration.json"
IMAGE = ROOT / "docs" / "images" / "expert_parallel_crossing.png"
CROSSING = (64, 2, 8)  # E, k, r
SHAPES = [(8, 2, 4), (128, 2, 4), (64, 8, 8)]
FULL_SHAPES = [*SHAPES, (8, 2, 16), (16, 2, 8), (32, 4, 16), (256, 2, 8)]
SECONDS = {2: 5.0, 4: 4.0}  # of repetitions per point, by ranks


def grid(full: bool) -> dict[int, list[Point]]:
    """Points by number of ranks."""
    crossing = [Point(2, *CROSSING, 2**n, 512) for n in range(4, 13 if full else 12)]
    shapes, tokens = (FULL_SHAPES, (16, 64, 256, 1024, 4096)) if full else (SHAPES, (32, 256, 1024))
    others = [Point(2, *shape, n, f) for f in ((512, 1024) if full else (512,)) for shape in shapes for n in tokens]
    stacks = [Point(2, 16, 2, 4, n, 256, in_windows=True) for n in (32, 512)]
    four = [Point(4, *shape, n, 512) for shape in shapes for n in (tokens if full else tokens[::2])]
    return {2: crossing + others + stacks, 4: four}


def start() -> dict[str, str]:
    """What every row says of the run."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() or "unknown",
        "command": " ".join(["python", "benchmarks/bench_expert_parallel.py", *sys.argv[1:]]),
        "hardware": f"{_processor()}, {os.cpu_count()} cores, gloo, 1 thread per rank",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(points: list[Point], world: int, calibration: bool) -> tuple[list[tuple[Point, list[Result]]], Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (world, folder, points, SECONDS[world], calibration), nprocs=world)
        return pickle.loads(Path(folder, RESULTS).read_bytes())


def row(point: Point, result: Result) -> dict[str, Any]:
    """One line of the CSV file."""
    moved = bytes_moved(point.E, point.ep, point.k, point.features, point.features, point.r, point.tokens, 4)
    expected = moved.get(result.case.split(",")[0])
    quartiles = statistics.quantiles(result.seconds, n=4)
    return {
        "ranks": point.ep,
        "E": point.E,
        "k": point.k,
        "r": point.r,
        "tokens_per_rank": point.tokens,
        "features": point.features,
        "layers": LAYERS if point.in_windows else 1,
        "case": result.case,
        "bytes_sent": round(result.sent),
        "bytes_formula": round(LAYERS * moved["weights"]) if point.in_windows else round(expected) if expected else "",
        "collectives": result.collectives,
        "ms_median": round(1e3 * quartiles[1], 3),
        "ms_q1": round(1e3 * quartiles[0], 3),
        "ms_q3": round(1e3 * quartiles[2], 3),
        "choices_dropped": round(result.dropped, 4),
    }


def regrets(rows: list[dict[str, Any]]) -> list[float]:
    """At each point: time of the way that "auto" takes / time of the fastest, both from the same run."""
    found, ways = [], {f"{dispatch}, {compute}" for dispatch, compute in WAYS}
    for first in (row for row in rows if row["case"] == NO_DROP):
        times = {row["case"]: row["ms_median"] for row in rows if same_point(row, first) and row["case"] in ways}
        found.append(times[auto(first)] / min(times.values()))
    return found


def auto(row: dict[str, Any]) -> str:
    """The way that "auto" takes for `ep_dispatch` and `expert_compute`."""
    E, ep, k, r, features = (row[key] for key in ("E", "ranks", "k", "r", "features"))
    spec = ShardSpec(
        layer_name="layer",
        num_experts=E,
        ep_size=ep,
        top_k=k,
        in_features=features,
        out_features=features,
        rank=r,
        dispatch="auto",
        compute="auto",
    )
    dispatch = choose_dispatch(spec)
    experts, chosen = (E, k) if dispatch == "weights" else (E // ep, max(1, k // ep))
    return f"{dispatch}, {choose_products('auto', experts, chosen, r).name}"


def same_point(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("ranks", "E", "k", "r", "tokens_per_rank", "features", "layers"))


def table(rows: list[dict[str, Any]], title: str) -> Table:
    result = Table(title=title)
    for name in ("ranks", "E", "k", "r", "tokens", "case", "MB sent", "formula", "collectives", "ms", "x fastest"):
        result.add_column(name, justify="left" if name == "case" else "right")
    for each in rows:
        fastest = min(other["ms_median"] for other in rows if same_point(each, other) and other["case"] != DEFAULTS)
        first = each is next(other for other in rows if same_point(each, other))
        note = f" ({each['choices_dropped']:.0%} dropped)" if each["case"] in (NO_DROP, DEFAULTS) else ""
        if first:
            result.add_section()
        result.add_row(
            *(str(each[key]) if first else "" for key in ("ranks", "E", "k", "r", "tokens_per_rank")),
            each["case"] + note,
            f"{each['bytes_sent'] / 1e6:.3f}",
            f"{each['bytes_formula'] / 1e6:.3f}" if each["bytes_formula"] != "" else "",
            str(each["collectives"]),
            f"{each['ms_median']:.2f}",
            f"{each['ms_median'] / fastest:.2f}",
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more shapes, sizes and features")
    parser.add_argument("--ranks", type=int, choices=[2, 4], help="only the points with so many ranks; writes no files")
    arguments = parser.parse_args()
    console, header, by_ranks = Console(width=130), start(), {}
    for world, points in grid(arguments.full).items():
        if arguments.ranks in (None, world):
            measured, calibration = run(points, world, calibration=world == 2)
            by_ranks[world] = [row(point, result) for point, results in measured for result in results]
            console.print(table(by_ranks[world], f"{world} ranks, forward and backward, {header['hardware']}"))
            regret = regrets(by_ranks[world])
            within = f"at most 1.10 at {sum(r <= 1.1 for r in regret)} of {len(regret)}"
            numbers = f"worst {max(regret):.3f}, median {statistics.median(regret):.3f}, {within}"
            console.print(f"{world} ranks, time of the way that auto takes / the fastest way's: {numbers}")
        if arguments.ranks is None and world == 2:
            found = {"backend": "gloo, 2 ranks", "hardware": header["hardware"], "date": header["date"], **calibration}
            CALIBRATION.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.ranks is not None:
        return
    rows = [{**header, **each} for found in by_ranks.values() for each in found]
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(CSV, IMAGE)


if __name__ == "__main__":
    main()
