"""The rows of the benchmark's file, cell by cell: tuned learning rates, reported seeds, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..harness import Row
from ..study import SEEDS, TUNING_SEED
from .runs import Run

OPEN = tuple(f.name for f in fields(Run) if f.name not in ("seed", "lr"))
# Two-sided 95 % quantile of Student's t with len(SEEDS) - 1 = 2 degrees of freedom.
T_QUANTILE = 4.303


@dataclass
class Cell:
    """All rows that differ in seed, learning rate and device alone."""

    rows: list[Row] = field(default_factory=list)

    @property
    def lr(self) -> float | None:
        """The tuned learning rate: the least training loss for the seed 0; None before it was found."""
        tried = {float(r["lr"]): float(r["train_loss"]) for r in self.rows if r["seed"] == str(TUNING_SEED)}
        found = [lr for lr, loss in tried.items() if math.isfinite(loss)]
        return min(found, key=lambda lr: tried[lr]) if found else None

    def at(self, lr: float | None, seed: int | None = None) -> list[Row]:
        """The rows of the reported seeds with one learning rate, by seed; of one seed, the rows of all devices."""
        rows = [row for row in self.rows if lr is not None and float(row["lr"]) == lr]
        if seed is not None:
            return [row for row in rows if row["seed"] == str(seed)]
        found = [self.at(lr, seed) for seed in SEEDS]
        return [of_seed[0] for of_seed in found if of_seed]

    @property
    def reported(self) -> list[Row]:
        """The rows of all reported seeds with the tuned learning rate; none, if one is missing."""
        rows = self.at(self.lr)
        return rows if len(rows) == len(SEEDS) else []

    def values(self, column: str) -> list[float]:
        """A figure of every reported seed; none, if a seed is missing."""
        return numbers(self.reported, column)

    def curves(self) -> list[list[float]]:
        """The training loss of every reported seed over the parts of the run."""
        curves = [[float(value) for value in row["curve"].split()] for row in self.reported]
        return curves if all(curves) else []


def numbers(rows: Iterable[Row], column: str) -> list[float]:
    """A column of some rows; NaN where a run that diverged has no figure."""
    return [float(row[column] or "nan") for row in rows]


class Cells:
    """Looks cells up by a run; `names`: the columns that seed and learning rate leave."""

    def __init__(self, rows: Iterable[Row], names: tuple[str, ...] = OPEN) -> None:
        self.names = names
        self.cells: dict[tuple[str, ...], Cell] = {}
        for row in rows:
            self.cells.setdefault(tuple(row[name] for name in names), Cell()).rows.append(row)

    def __getitem__(self, run: Any) -> Cell:
        """The cell of a run; an empty one, if the file has none."""
        return self.cells.get(tuple(str(getattr(run, name)) for name in self.names), Cell())


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """ "mean ± standard deviation"; a dash without values, "diverged" with an infinite one."""
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """a - b seed by seed: both saw the same examples in the same order, from the same start.

    Args:
        values: by seed. across: whether rows of different devices were compared, as no device has both.
    """

    values: tuple[float, ...]
    across: bool = False

    @classmethod
    def of(cls, a: Cell, b: Cell, column: str = "train_loss") -> Difference:
        if not a.reported or not b.reported:
            return cls(())
        values, across = [], False
        for seed in SEEDS:
            pairs = [(x, y) for x in a.at(a.lr, seed) for y in b.at(b.lr, seed)]
            alike = [(x, y) for x, y in pairs if x.get("device") == y.get("device")]
            across |= not alike
            (x,), (y,) = (numbers([row], column) for row in (alike or pairs)[0])
            values += [x - y] if math.isfinite(x - y) else []
        return cls(tuple(values), across)

    @property
    def beyond_noise(self) -> bool:
        """Whether the mean is more than 4.3 standard errors from 0: p < 0.05 in a paired t-test of three seeds."""
        if len(self.values) < len(SEEDS):
            return False
        error = statistics.stdev(self.values) / math.sqrt(len(self.values))
        return abs(statistics.fmean(self.values)) > T_QUANTILE * error

    def __str__(self) -> str:
        if len(self.values) < len(SEEDS):
            return "-"
        if not any(self.values):
            return "0 (equal)"
        text = f"{statistics.fmean(self.values):+.3f} ± {statistics.stdev(self.values):.3f}"
        return (f"**{text}**" if self.beyond_noise else text) + (" †" if self.across else "")
