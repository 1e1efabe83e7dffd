"""Draws how times grow, from benchmarks/results/{layer,optimizer}.csv, into docs/images/. Needs matplotlib.

    pip install -e '.[bench]'; python -m benchmarks.plots

Log-log: time of forward and backward over tokens, over experts and over the rank, 1024 x 1024, float32. Dashed: the
straight line that theory gives through the dense form's largest case; over tokens time is proportional to them, over
experts and ranks what is *added* to the base layer is proportional to E r. The optimizer over pairs, experts, the
rank r (its operations grow as r^2, its bytes as r) and processes (1 / N).
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .harness import RESULTS, ROOT, Row, read_rows

IMAGES = ROOT.parent / "docs" / "images"
STYLES = {"base": "k.-", "peft": "C0.-", "dense": "C1.-", "grouped": "C2.-", "loop": "C3.-"}


def finish(axes: Axes, fixed: dict[str, str], measured_at: set[float]) -> None:
    """The title, and ticks where something was measured."""
    axes.set_xticks(sorted(measured_at), [f"{at:g}" for at in sorted(measured_at)], fontsize=8)
    axes.minorticks_off()
    axes.set_title(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fixed.items()), fontsize=8)
    axes.legend(fontsize=7)


def draw(axes: Axes, rows: list[Row], axis: str, fixed: dict[str, str], added: bool) -> None:
    """One panel: times of all contenders in the cases with the columns `fixed`, over the column `axis`."""
    common = {"mode": "train", "dtype": "float32", "heap": "default", "in_features": "1024", "out_features": "1024"}
    rows = [row for row in rows if all(row[name] == value for name, value in {**common, **fixed}.items())]
    base = {float(row[axis]): float(row["median_ms"]) for row in rows if row["contender"] == "base"}
    for name, style in STYLES.items():
        points = sorted((float(row[axis]), float(row["median_ms"])) for row in rows if row["contender"] == name)
        if added:
            points = [(at, ms - base[at]) for at, ms in points if ms > base[at]]
        if not points:
            continue
        axes.loglog(*zip(*points, strict=True), style, label=name)
        if name == "dense":
            xs = [at for at, _ in points]
            axes.loglog(xs, [points[-1][1] * at / xs[-1] for at in xs], "C1--", linewidth=1, label="proportional")
    axes.set_xlabel(axis.replace("_", " "))
    axes.set_ylabel("ms added to the base layer" if added else "ms, forward and backward")
    finish(axes, fixed, set(base))


OPTIMIZER_STYLES = {"torch": "k.-", "eager": "C1.-", "cpp": "C2.-", "loop": "C3.-"}
# part, axis, fixed columns, power of the axis with which theory has the time grow
OPTIMIZER_PANELS: list[tuple[str, str, dict[str, str], float]] = [
    ("whole", "modules", {"experts": "20", "rank": "4", "features": "512"}, 1),
    ("whole", "experts", {"modules": "112", "rank": "4", "features": "1024"}, 1),
    ("whole", "rank", {"modules": "112", "experts": "8", "features": "1024"}, 1),
    ("zero", "ranks", {"modules": "112", "experts": "20", "rank": "4"}, -1),
]


def draw_optimizer(axes: Axes, rows: list[Row], part: str, axis: str, fixed: dict[str, str], power: float) -> None:
    """One panel: milliseconds per AdamW step over the column `axis`, and theory's line through our first point."""
    wanted = {"part": part, "optimizer": "AdamW", **fixed}
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    for name, style in OPTIMIZER_STYLES.items():
        points = sorted((float(row[axis]), float(row["median_ms"])) for row in rows if row["contender"] == name)
        if not points:
            continue
        axes.loglog(*zip(*points, strict=True), style, label=name)
        if name == "eager":
            start, ms = points[0]
            line = [ms * (at / start) ** power for at, _ in points]
            axes.loglog([at for at, _ in points], line, "C1--", linewidth=1, label=f"{axis}^{power:g}")
    axes.set_xlabel({"ranks": "processes, ZeRO-2"}.get(axis, axis))
    axes.set_ylabel("ms of CPU time per step")
    finish(axes, fixed, {float(row[axis]) for row in rows})


def optimizer_figure() -> None:
    rows = read_rows(RESULTS / "optimizer.csv")
    figure, all_axes = plt.subplots(1, len(OPTIMIZER_PANELS), figsize=(15, 3.8), layout="constrained")
    for axes, panel in zip(all_axes, OPTIMIZER_PANELS, strict=True):
        draw_optimizer(axes, rows, *panel)
    figure.suptitle(f"One AdamW step; {rows[0]['hardware']}; {rows[0]['date']}", fontsize=8)
    figure.savefig(IMAGES / "optimizer_scaling.png", dpi=110)


def main() -> None:
    optimizer_figure()
    rows = read_rows(RESULTS / "layer.csv")
    panels: list[tuple[str, dict[str, str], bool]] = [
        ("tokens", {"experts": "20", "top_k": "10", "rank": "4"}, False),
        ("experts", {"top_k": "2", "rank": "4", "tokens": "2048"}, True),
        ("rank", {"experts": "8", "top_k": "2", "tokens": "2048"}, True),
    ]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axes, (axis, fixed, added) in zip(all_axes, panels, strict=True):
        draw(axes, rows, axis, fixed, added)
    figure.suptitle(f"One layer, 1024 x 1024, float32; {rows[0]['hardware']}; {rows[0]['date']}", fontsize=8)
    figure.savefig(IMAGES / "layer_scaling.png", dpi=110)


if __name__ == "__main__":
    main()
