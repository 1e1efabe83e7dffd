"""Draws the picture of the documentation that comes from no measurement: `python docs/site/pictures.py`.

Needs matplotlib (`pip install -e '.[bench]'`). Writes docs/images/zero_pair.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

IMAGES = Path(__file__).resolve().parents[1] / "images"
BLUE, GREEN, INK = "#dbe7f6", "#dff0dc", "#222222"


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
    zero_pair()
