"""The loads of a model's experts as a picture: one row per layer, one column per expert. PIL alone draws it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# log2(load) from -2 to 2: a quarter of an even share to four times that.
COLORS = np.array([[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]], dtype=float)
DEAD, ABSENT = (0, 0, 0), (255, 255, 255)
LEGEND = (("dead", 0.0), ("1/4", 0.25), ("1/2", 0.5), ("even", 1.0), ("2x", 2.0), ("4x", 4.0))
MARGIN, MAX_NAME = 8, 44
CELL_HEIGHT = {24: 18, 64: 14, 10**9: 6}  # up to so many layers: pixels per layer


def colors_of(loads: Tensor) -> np.ndarray:
    """(L, E) loads over their ideal -> (L, E, 3) uint8. White is an even share, black none at all."""
    x = loads.double().clamp(0.25, 4).log2().nan_to_num(0).numpy()
    rgb = np.stack([np.interp(x, np.linspace(-2, 2, len(COLORS)), channel) for channel in COLORS.T], -1)
    rgb[(loads == 0).numpy()] = DEAD
    rgb[loads.isnan().numpy()] = ABSENT
    return rgb.round().astype(np.uint8)


def heat_map(loads: Tensor, names: Sequence[str], step: int) -> np.ndarray:
    """The picture of one step.

    Args:
        loads: (L, E), `monitoring.formulas.load_over_ideal`. names: of the layers. step: for the title.

    Returns:
        (height, width, 3) uint8.
    """
    L, E = loads.shape
    font = ImageFont.load_default(size=12)
    cell_h = next(height for limit, height in CELL_HEIGHT.items() if limit >= L)
    cell_w = max(min(40, 800 // max(E, 1)), 4)
    labels = [_short(name) for name in names]
    left = MARGIN + int(max((font.getlength(label) for label in labels), default=0)) + MARGIN
    width = max(left + E * cell_w + MARGIN, left + 60 * len(LEGEND))
    top, height = 46, 46 + L * cell_h + 60
    image = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.text((left, 4), f"load over even share, step {step}", fill=0, font=font)
    cells = Image.fromarray(colors_of(loads)).resize((E * cell_w, L * cell_h), Image.Resampling.NEAREST)
    image.paste(cells, (left, top))
    every = max(-(-14 // cell_h), 1)  # a line of text is 14 pixels high
    for row in range(0, L, every):
        y = top + row * cell_h + cell_h // 2
        draw.text((left - MARGIN, y), labels[row], fill=0, font=font, anchor="rm")
    for column in range(0, E, max(-(-26 // cell_w), 1)):
        x = left + column * cell_w + cell_w // 2
        draw.text((x, top - 12), str(column), fill=0, font=font, anchor="mm")
    draw.rectangle((left - 1, top - 1, left + E * cell_w, top + L * cell_h), outline=(120, 120, 120))
    for i, (label, load) in enumerate(LEGEND):
        x, y = left + 60 * i, height - 36
        color = colors_of(torch.tensor([[load]]))[0, 0]
        draw.rectangle((x, y, x + 40, y + 12), fill=tuple(color.tolist()), outline=(120, 120, 120))
        draw.text((x + 20, y + 22), label, fill=0, font=font, anchor="mm")
    return np.asarray(image)


def _short(name: str) -> str:
    """The end of a module's name, without what all of them have in common in PEFT models."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    return name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :]
