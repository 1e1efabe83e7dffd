"""Draws the pictures of the documentation that come from no measurement: `python docs/site/pictures.py`.

Needs matplotlib (`pip install -e '.[bench]'`). Writes docs/images/architecture.png and docs/images/zero_pair.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

IMAGES = Path(__file__).resolve().parents[1] / "images"
BLUE, GREEN, ORANGE, GREY, INK = "#dbe7f6", "#dff0dc", "#fbe5cf", "#eeeeee", "#222222"


def box(axes: Any, x: float, y: float, width: float, height: float, title: str, text: str, colour: str) -> None:
    """A rounded box with a title and a line below it."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", facecolor=colour, edgecolor=INK))
    axes.text(x + width / 2, y + height * 0.64, title, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(x + width / 2, y + height * 0.27, text, ha="center", va="center", fontsize=8)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow from `start` to `end` with a word beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1))
    if text:
        axes.text((start[0] + end[0]) / 2 + 0.06, (start[1] + end[1]) / 2, text, fontsize=8, va="center")


def architecture() -> None:
    """Who knows whom: the import direction that tests/project/test_package.py keeps."""
    figure, axes = plt.subplots(figsize=(9, 5))
    axes.set(xlim=(0, 9), ylim=(0, 5.2))
    axes.axis("off")
    box(axes, 3.2, 0.1, 2.6, 0.9, "core", "maths on local tensors; torch alone", BLUE)
    box(axes, 0.2, 1.7, 2.6, 0.9, "adapters", "the PEFT tuner: layers, saving", GREEN)
    box(axes, 6.2, 1.7, 2.6, 0.9, "parallel", "where ZeRO's slices lie; exchange", ORANGE)
    box(axes, 6.2, 3.0, 2.6, 0.9, "optim", "GateRiemannianAdamW, -SGD", GREEN)
    box(axes, 3.2, 2.35, 2.6, 0.9, "tags", "pairs: adapter meets optimizer", GREY)
    box(axes, 0.2, 4.2, 2.6, 0.9, "launch", "scripts around TRL and Trainer", GREY)
    box(axes, 3.2, 4.2, 2.6, 0.9, "plugin", "registers with DeepSpeed and PEFT", BLUE)
    box(axes, 6.2, 4.2, 2.6, 0.9, "DeepSpeed", "engine, ZeRO, expert groups", GREY)
    arrow(axes, (1.5, 1.7), (3.7, 1.02))
    arrow(axes, (7.5, 1.7), (5.3, 1.02))
    arrow(axes, (7.5, 3.0), (7.5, 2.62))
    arrow(axes, (2.8, 2.3), (3.2, 2.6), "")
    arrow(axes, (6.2, 3.3), (5.8, 3.0), "")
    arrow(axes, (4.0, 4.2), (1.9, 2.62))
    arrow(axes, (5.2, 4.2), (6.4, 3.92))
    arrow(axes, (2.8, 4.65), (3.2, 4.65))
    arrow(axes, (5.8, 4.65), (6.2, 4.65))
    figure.savefig(IMAGES / "architecture.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def zero_pair() -> None:
    """A pair in ZeRO's flat buffer, cut by the boundary of two ranks, and what is exchanged for it."""
    figure, axes = plt.subplots(figsize=(9, 3.6))
    axes.set(xlim=(-0.2, 16.4), ylim=(-2.5, 2.7))
    axes.axis("off")
    names = [("lora_A, expert 0", 0), ("lora_A, expert 1", 4), ("lora_B, expert 0", 8), ("lora_B, expert 1", 12)]
    boundary = 6.4
    for row in range(16):
        cut = row < boundary < row + 1
        for part, (start, end) in enumerate([(row, min(row + 1, boundary)), (max(row, boundary), row + 1)]):
            if end > start:
                colour = "#f4b183" if cut else (BLUE if part == 0 else GREEN)
                axes.add_patch(Rectangle((start, 0), end - start, 1, facecolor=colour, edgecolor=INK, linewidth=0.8))
    for name, start in names:
        axes.annotate("", (start + 0.05, 1.25), (start + 3.95, 1.25), arrowprops={"arrowstyle": "<->", "color": INK})
        axes.text(start + 2, 1.4, name, ha="center", fontsize=9)
    axes.plot([boundary, boundary], [-0.35, 2.05], color="#c00000", linewidth=2)
    axes.text(boundary, 2.2, "ZeRO's boundary", ha="center", color="#c00000", fontsize=9)
    axes.text(boundary / 2, -0.35, "rank 0", ha="center", fontsize=10, weight="bold")
    axes.text((boundary + 16) / 2, -0.35, "rank 1", ha="center", fontsize=10, weight="bold")
    steps = [
        "each cell: a row of r numbers; orange: the row that the boundary cuts, of which each rank sends its part",
        "1  each rank sums the Gram matrices (r x r) of its whole rows, per expert",
        "2  one all-reduce: all Gram matrices and the cut rows; its size does not depend on the width of the layer",
        "3  each rank multiplies its own rows by (G + d I)^-1 where they lie; torch's fused AdamW does the rest",
    ]
    for number, text in enumerate(steps):
        axes.text(0, -0.95 - 0.45 * number, text, fontsize=9)
    figure.savefig(IMAGES / "zero_pair.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    architecture()
    zero_pair()
