"""Draws where moving weights and moving tokens cross, from the CSV file of `bench_expert_parallel.py`.

python benchmarks/expert_parallel_plot.py        # draws again without measuring
"""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks" / "results" / "expert_parallel.csv"
IMAGE = ROOT / "docs" / "images" / "expert_parallel_crossing.png"
SHAPE = {"ranks": "2", "E": "64", "k": "2", "r": "8", "features": "512", "layers": "1"}
LINES = {
    "weights, dense": ("tab:blue", "--"),
    "weights, grouped": ("tab:blue", "-"),
    "tokens, dense": ("tab:orange", "--"),
    "tokens, grouped": ("tab:orange", "-"),
    "DeepSpeed MoE, drop_tokens=False": ("tab:gray", ":"),
}


def draw(source: Path, target: Path) -> None:
    """Time and bytes over tokens; without matplotlib it says so and draws nothing."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so nothing was drawn: pip install -e .[bench]")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with source.open() as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] == value for key, value in SHAPE.items())]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, label, unit in zip(
        axes, ("ms_median", "bytes_sent"), ("ms, forward and backward", "MB that a rank sends"), (1, 1e6), strict=True
    ):
        for case, (color, style) in LINES.items():
            if key == "bytes_sent" and case.endswith("dense"):
                continue  # the same bytes as grouped
            points = [(int(row["tokens_per_rank"]), float(row[key]) / unit) for row in rows if row["case"] == case]
            name = case.split(",")[0] if key == "bytes_sent" and not case.startswith("DeepSpeed") else case
            axis.plot(*zip(*sorted(points), strict=True), color=color, linestyle=style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens per rank", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    shape = f"E={SHAPE['E']}, k={SHAPE['k']}, r={SHAPE['r']}, {SHAPE['features']} features, {SHAPE['ranks']} ranks"
    figure.suptitle(f"One layer, {shape} ({rows[0]['hardware']}, {rows[0]['date']})", fontsize=10)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(CSV, IMAGE)
