"""The loads of a model's experts as a picture: one panel per projection, one row per layer. PIL draws it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .meter import Report

# log2(load) from -2 to 2: a quarter of an even share to four times that.
COLORS = np.array([[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]], dtype=float)
DEAD, ABSENT = (0, 0, 0), (255, 255, 255)
LEGEND = (("dead", 0.0), ("1/4", 0.25), ("1/2", 0.5), ("even", 1.0), ("2x", 2.0), ("4x", 4.0))
MARGIN, MAX_NAME = 8, 44
TOP, PANEL_TOP, PANEL_WIDTH, MAX_WIDTH = 30, 38, 320, 1600  # pixels
CELL_HEIGHT = {24: 18, 64: 14, 10**9: 6}  # up to so many layers: pixels per layer


def colors_of(loads: Tensor) -> np.ndarray:
    """(L, E) loads over their ideal -> (L, E, 3) uint8. White is an even share, black none at all."""
    x = loads.double().clamp(0.25, 4).log2().nan_to_num(0).numpy()
    rgb = np.stack([np.interp(x, np.linspace(-2, 2, len(COLORS)), channel) for channel in COLORS.T], -1)
    rgb[(loads == 0).numpy()] = DEAD
    rgb[loads.isnan().numpy()] = ABSENT
    return rgb.round().astype(np.uint8)


def write_heat_map(writer: Any, report: Report, step: int, every: int) -> None:
    """The heat map of the first and then of every `every`-th report, into the run of a `SummaryWriter`; 0: of none."""
    if every and report.number % every == 0 and len(report.loads):
        writer.add_image("moe/load", heat_map(report.loads, report.layers, step), step, dataformats="HWC")
        writer.flush()


def heat_map(loads: Tensor, names: Sequence[str], step: int) -> np.ndarray:
    """The picture of one step: a panel per kind of module (projection), in it a row per layer, a column per expert.

    Args:
        loads: (L, E), `monitoring.formulas.load_over_ideal`. names: of the layers. step: for the title.

    Returns:
        (height, width, 3) uint8.
    """
    E = loads.shape[1]
    font = ImageFont.load_default(size=12)
    kinds: dict[str, list[tuple[str, int]]] = {}
    for row, name in enumerate(names):
        kind, number = _split(name)
        kinds.setdefault(kind, []).append((number, row))
    longest = max(map(len, kinds.values()), default=1)
    cell_h = next(height for limit, height in CELL_HEIGHT.items() if limit >= longest)
    cell_w = max(min(40, PANEL_WIDTH // max(E, 1)), 4)
    left = MARGIN + int(max(font.getlength(number) for rows in kinds.values() for number, _ in rows)) + MARGIN
    panel_w = left + max(E * cell_w, int(max(map(font.getlength, kinds)))) + 2 * MARGIN
    panel_h = PANEL_TOP + longest * cell_h + 2 * MARGIN
    across = max(min(MAX_WIDTH // panel_w, len(kinds)), 1)
    width = max(across * panel_w, 60 * len(LEGEND) + 2 * MARGIN)
    height = TOP + -(-len(kinds) // across) * panel_h + 50
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 4), f"load over even share, step {step}: rows are layers, columns experts", fill=0, font=font)
    for place, (kind, rows) in enumerate(kinds.items()):
        x, y = place % across * panel_w, TOP + place // across * panel_h
        draw.text((x + left, y), kind, fill=0, font=font)
        _draw_panel(image, draw, font, loads[[row for _, row in rows]], [n for n, _ in rows], (x + left, y + PANEL_TOP),
                    (cell_w, cell_h))  # fmt: skip
    for i, (label, load) in enumerate(LEGEND):
        x, y = MARGIN + 60 * i, height - 36
        color = colors_of(torch.tensor([[load]]))[0, 0]
        draw.rectangle((x, y, x + 40, y + 12), fill=tuple(color.tolist()), outline=(120, 120, 120))
        draw.text((x + 20, y + 22), label, fill=0, font=font, anchor="mm")
    return np.asarray(image)


def _draw_panel(
    image: Image.Image,
    draw: Any,
    font: Any,
    loads: Tensor,
    labels: list[str],
    at: tuple[int, int],
    cell: tuple[int, int],
) -> None:
    """Cells of one kind of module, with the numbers of layers and experts that there is room for."""
    (rows, columns), (x, y), (cell_w, cell_h) = loads.shape, at, cell
    cells = Image.fromarray(colors_of(loads)).resize((columns * cell_w, rows * cell_h), Image.Resampling.NEAREST)
    image.paste(cells, at)
    for row in range(0, rows, max(-(-14 // cell_h), 1)):  # a line of text is 14 pixels high
        draw.text((x - MARGIN, y + row * cell_h + cell_h // 2), labels[row], fill=0, font=font, anchor="rm")
    for column in range(0, columns, max(-(-26 // cell_w), 1)):
        draw.text((x + column * cell_w + cell_w // 2, y - 10), str(column), fill=0, font=font, anchor="mm")
    draw.rectangle((x - 1, y - 1, x + columns * cell_w, y + rows * cell_h), outline=(120, 120, 120))


def _split(name: str) -> tuple[str, str]:
    """("self_attn.q_proj", "3") of "model.layers.3.self_attn.q_proj"; ("lm_head", "") where there is no number."""
    found = re.search(r"\.(\d+)\.(?!.*\.\d+\.)(.+)$", name)
    kind, number = (found.group(2), found.group(1)) if found else (name.removeprefix("base_model.model."), "")
    return (kind if len(kind) <= MAX_NAME else "..." + kind[3 - MAX_NAME :]), number
