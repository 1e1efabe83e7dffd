"""What both optimizers add to torch's options; every one of them can be set per parameter group."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..pairs import GATE_SCALINGS


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """See `GateRiemannianAdamW`.

    Raises:
        ValueError: a value out of range; the message names the value, the bound and the remedy.
    """

    damping: float = 1e-6
    gate_scaling: str = "sqrt"
    scale_input_grad: bool = False
    gate_lr_scale: float = 1.0
    include_scaling: bool = False

    def __post_init__(self) -> None:
        for name, value in (("damping", self.damping), ("gate_lr_scale", self.gate_lr_scale)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number >= 0; the papers use damping=1e-6.")
        if self.gate_scaling not in GATE_SCALINGS:
            choices = ", ".join(map(repr, GATE_SCALINGS))
            raise ValueError(f"gate_scaling={self.gate_scaling!r} is unknown; choose one of {choices}.")
        for name in ("scale_input_grad", "include_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")


DEFAULTS = asdict(PairOptions())


def check_options(group: dict[str, Any]) -> None:
    """Raises a ValueError if a parameter group's options are out of range."""
    PairOptions(**{name: group[name] for name in DEFAULTS})
