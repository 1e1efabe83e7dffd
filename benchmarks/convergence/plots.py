"""The plots of docs/convergence.md."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..study import SEEDS
from . import studies
from .results import Cell, Cells
from .runs import Run
from .tables import TASKS, TOP_K

COLORS = {name: f"C{i}" for i, name in enumerate(studies.PAPERS)}
DPI = 80


def band(axes: Any, x: list[float], runs: list[list[float]], color: str, label: str) -> None:
    """The mean over seeds, and the range from the lowest to the highest."""
    columns = list(zip(*runs, strict=True))
    axes.plot(x, [statistics.fmean(values) for values in columns], color=color, label=label, linewidth=1.2)
    axes.fill_between(x, [min(v) for v in columns], [max(v) for v in columns], color=color, alpha=0.15, linewidth=0)


def draw_curves(axes: Any, cells: Cells, runs: list[Run], title: str) -> None:
    """Training loss over steps, each method at its tuned learning rate."""
    for run in runs:
        cell = cells[run]
        curves = cell.curves()
        if curves:
            width = run.steps / len(curves[0])
            x = [(i + 0.5) * width for i in range(len(curves[0]))]
            band(axes, x, curves, COLORS[run.method], f"{run.method}, {cell.lr:g}")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    if axes.lines:
        axes.legend(fontsize=6, title="method, learning rate", title_fontsize=6)
    else:
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)


def curves_figure(cells: Cells, size: str, path: Path) -> None:
    """Both real tasks, every top_k."""
    figure, rows = plt.subplots(len(studies.ENCODER_TASKS), len(TOP_K), figsize=(15, 7), layout="constrained")
    for task, panels in zip(studies.ENCODER_TASKS, rows, strict=True):
        panels[0].set_ylabel("training loss", fontsize=8)
        for top_k, axes in zip(TOP_K, panels, strict=True):
            runs = [studies.cell(size, task, method, top_k=top_k) for method in studies.PAPERS]
            draw_curves(axes, cells, runs, f"{TASKS[task]}, top_k = {top_k} of 8")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def other_curves_figure(cells: Cells, size: str, path: Path) -> None:
    """GOAT's start."""
    figure, panels = plt.subplots(1, len(studies.ENCODER_TASKS), figsize=(9, 3.8), layout="constrained")
    for task, axes in zip(studies.ENCODER_TASKS, panels, strict=True):
        runs = [studies.cell(size, task, method, start="goat") for method in studies.PAPERS]
        draw_curves(axes, cells, runs, f"{TASKS[task]}, GOAT's start, top_k = 2 of 8")
    panels[0].set_ylabel("training loss", fontsize=8)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def over_lr(cell: Cell) -> dict[float, list[float]]:
    """Training losses of the reported seeds by learning rate, where all of them are there."""
    rates = sorted({float(row["lr"]) for row in cell.rows})
    found = {lr: [float(row["train_loss"]) for row in cell.at(lr)] for lr in rates}
    return {lr: losses for lr, losses in found.items() if len(losses) == len(SEEDS)}


def sensitivity_figure(cells: Cells, size: str, path: Path) -> None:
    """Final loss over the learning rate, without rates at which a seed diverged."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, family in zip(panels, ("SGD", "AdamW"), strict=True):
        for method in (name for name in studies.PAPERS if family in name):
            points = over_lr(cells[studies.cell(size, studies.ABLATION_TASK, method)])
            points = {lr: losses for lr, losses in points.items() if all(map(math.isfinite, losses))}
            if len(points) > 1:
                runs = [list(run) for run in zip(*points.values(), strict=True)]
                band(axes, list(points), runs, COLORS[method], method)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        if axes.lines:
            axes.legend(fontsize=7)
    panels[0].set_ylabel("final training loss")
    figure.suptitle(f"{TASKS[studies.ABLATION_TASK]}, top_k = 2 of 8, three seeds", fontsize=9)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def damping_figure(cells: Cells, size: str, path: Path) -> None:
    """Final loss over the damping, each at its own tuned learning rate."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
    for axes, name, title in (
        (panels[0], "damping", "d"),
        (panels[1], "relative_damping", "d / trace(G)"),
    ):
        for method in ("gRAdamW (sqrt)", "gRSGD (sqrt)"):
            runs = [run for run in studies.damping(size) if run.method == method and getattr(run, name)]
            runs = [run for run in runs if cells[run].reported]
            means = [statistics.fmean(cells[run].values("train_loss")) for run in runs]
            spread = [statistics.stdev(cells[run].values("train_loss")) for run in runs]
            x = [getattr(run, name) for run in runs]
            axes.errorbar(x, means, spread, marker="o", capsize=3, color=COLORS[method], label=method)
        axes.set_xscale("log")
        axes.set_xlabel(title)
    panels[0].set_ylabel("final training loss")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


FIGURES = {
    "convergence_curves.png": curves_figure,
    "convergence_others.png": other_curves_figure,
    "convergence_lr.png": sensitivity_figure,
    "convergence_damping.png": damping_figure,
}
