"""benchmarks/results/scaling.csv as TensorBoard scalars over the number of ranks, as a picture and as a table.

python -m benchmarks.scaling_plot        # draws again, and prints the tables, without measuring
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from .harness import RESULTS, ROOT, Row, read_rows

IMAGE = ROOT.parent / "docs" / "images" / "scaling.png"
SCALARS = {
    "tokens_per_second": "tokens_per_second",
    "efficiency": "efficiency",
    "work_efficiency": "work_efficiency",
    "cpu_seconds_per_rank": "cpu_ms",
    "sent_bytes_per_rank": "sent_bytes",
    "collectives": "collectives",
    "memory_bytes_per_rank": "memory_mb",
}
UNITS = {"cpu_ms": 1e-3, "memory_mb": 1e6}
PANELS = {"work_efficiency": "work per token, 1 rank / N ranks", "sent_bytes": "MB sent per rank and step",
          "collectives": "collectives per step", "memory_mb": "MB per rank"}  # fmt: skip
# (contender, stage, ep_size) -> style
LINES = {
    ("lora", "2", "1"): "k.--",
    ("adamw", "2", "1"): "k.:",
    ("ours", "0", "1"): "C0.-",
    ("ours", "1", "1"): "C1.-",
    ("ours", "2", "1"): "C2.-",
    ("ours", "3", "1"): "C3.-",
    ("ours", "0", "2"): "C0x--",
    ("ours", "2", "2"): "C2x--",
}


def write_scalars(rows: list[Row], logdir: Path) -> None:
    """One run per mode, stage, ep_size and contender; the horizontal axis ("step") is the number of ranks."""
    for run in sorted({_run(row) for row in rows}):
        with SummaryWriter(str(logdir / run)) as writer:
            for row in (row for row in rows if _run(row) == run):
                for name, column in SCALARS.items():
                    writer.add_scalar(f"scaling/{name}", float(row[column]) * UNITS.get(column, 1), int(row["world"]))


def _run(row: Row) -> str:
    return f"{row['mode']}-zero{row['stage']}-ep{row['ep_size']}-{row['contender']}"


def draw(rows: list[Row], target: Path, logdir: Path | None = None) -> None:
    """Weak scaling above, strong below; also into TensorBoard. Without matplotlib it says so and draws nothing."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so nothing was drawn: pip install -e '.[bench]'")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, len(PANELS), figsize=(4 * len(PANELS), 7), sharex=True)
    for mode, line_of_axes in zip(("weak", "strong"), grid, strict=True):
        for axes, (column, title) in zip(line_of_axes, PANELS.items(), strict=True):
            for (contender, stage, ep_size), style in LINES.items():
                same = {"mode": mode, "contender": contender, "stage": stage, "ep_size": ep_size}
                found = [row for row in rows if all(row[name] == value for name, value in same.items())]
                unit = 1e6 if column == "sent_bytes" else 1
                points = sorted((int(row["world"]), float(row[column]) / unit) for row in found)
                if points:
                    extra = f", ep_size {ep_size}" if ep_size != "1" else ""
                    axes.plot(*zip(*points, strict=True), style, label=f"{contender}, ZeRO-{stage}{extra}")
            axes.set_title(f"{mode}: {title}", fontsize=10)
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted({int(row["world"]) for row in rows}))
    for axes in grid[1]:
        axes.set_xlabel("ranks")
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    if logdir is not None:
        with SummaryWriter(str(logdir)) as writer:
            writer.add_image("scaling/plot", np.asarray(Image.open(target).convert("RGB")), dataformats="HWC")


def table(rows: list[Row], mode: str) -> str:
    """Markdown: one line per way to run, one column per figure and number of ranks."""
    worlds = sorted({int(row["world"]) for row in rows})
    columns = {"sent_bytes": "MB sent", "collectives": "collectives", "memory_mb": "MB held",
               "work_efficiency": "work efficiency", "efficiency": "efficiency"}  # fmt: skip
    shown = " / ".join(map(str, worlds))
    lines = [f"| {mode} scaling; {shown} ranks | {' | '.join(columns.values())} |", "|---|" + "---|" * len(columns)]
    for contender, stage, ep_size in LINES:
        same = {"mode": mode, "contender": contender, "stage": stage, "ep_size": ep_size}
        found = {int(r["world"]): r for r in rows if all(r[name] == value for name, value in same.items())}
        cells = []
        for column in columns:
            values = [_shown(found[world][column], column) if world in found else "-" for world in worlds]
            cells.append(" / ".join(values))
        if found:
            lines.append(f"| {contender}, ZeRO-{stage}, ep_size {ep_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: str, column: str) -> str:
    if column == "sent_bytes":
        return f"{float(value) / 1e6:.2f}"
    return f"{float(value):.0f}" if column == "collectives" else f"{float(value):.2f}".removesuffix("0")


def main() -> None:
    rows = read_rows(RESULTS / "scaling.csv")
    draw(rows, IMAGE)
    for mode in ("weak", "strong"):
        print(table(rows, mode), end="\n\n")


if __name__ == "__main__":
    main()
