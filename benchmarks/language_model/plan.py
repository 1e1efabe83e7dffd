"""Which runs the study consists of, the most telling first, so that it may be cut off anywhere.

How rates are tuned: `benchmarks.study`. Where a method's rate is known from MAWPS, the search begins there, rung by
rung: three runs if the rate stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..study import SEEDS, Execute, Job, reported, rung, tune
from .runs import FAILED_LOSS, Run

SIZES = {  # (steps, batch)
    "full": {"mawps": (48, 8), "gsm8k": (48, 4), "skills": (64, 8)},
    "tiny": {"mawps": (4, 2), "gsm8k": (2, 2), "skills": (2, 4)},
}
# Rungs at which the search begins: the best ones on MAWPS (SGD's is not known). They affect how many runs it takes.
FIRST_RUNGS = {"LoRA+": -15, "LoRA": -12, "Muon": -7, "AdamW": -10, "RSGD": -8, "SGD": -6}
MAIN = ("AdamW", "LoRA, AdamW", "gRAdamW (sqrt)", "RAdamW", "Muon", "gMuon (full)", "gRSGD (sqrt)", "RSGD")
MORE = ("LoRA+, AdamW", "gRAdamW (full)", "gMuon (sqrt)", "gRSGD (full)")
SHORT = ("AdamW", "LoRA, AdamW", "Muon")
USUAL = ("AdamW", "LoRA, AdamW")
ON_BOTH = ("AdamW", "gRAdamW (sqrt)")  # run on every device that rows come from
HALF = 15  # layers of SmolLM2-135M
SOURCE = {"r": 4, "layers": HALF}
FAR: tuple[dict[str, int], ...] = (
    {"r": 4, "layers": 0},
    *({"r": r, "layers": HALF} for r in (2, 32)),
    {"r": 4, "layers": HALF, "num_experts": 16},
)
NEARER: tuple[dict[str, int], ...] = ({"r": 8, "layers": HALF}, {"r": 4, "layers": HALF, "num_experts": 2})
TRANSFER_METHODS = ("AdamW", "gRAdamW (sqrt)", "Muon")


def first_rung(cell: Run) -> int:
    """Where the search for a rate begins."""
    return next(number for part, number in FIRST_RUNGS.items() if part in cell.method)


def best_rung(cell: Run, execute: Execute, strides: tuple[int, ...] = (2, 1), first: int | None = None) -> int:
    """The tuned one. A run that ends worse than it began is no minimum, however its neighbours do."""

    def finite(run: Run) -> dict[str, Any]:
        outcome = execute(run)
        return {"train_loss": math.inf if outcome["train_loss"] > FAILED_LOSS else outcome["train_loss"]}

    return tune(cell, finite, first_rung(cell) if first is None else first, strides)


def tuned(cell: Run, execute: Execute) -> None:
    """The search, then the reported seeds."""
    reported(cell, execute, rung(best_rung(cell, execute)))


def tuned_near(cell: Run, execute: Execute) -> None:
    """The same, with a search that begins at MAWPS's rate."""
    reported(cell, execute, rung(best_rung(cell, execute, (1,))))


def known(cell: Run, execute: Execute) -> None:
    """One seed at MAWPS's rate."""
    execute(replace(cell, lr=rung(first_rung(cell)), seed=SEEDS[0]))


def on_this_device(cell: Run, execute: Execute) -> None:
    """One seed at MAWPS's rate, whether or not another device did it."""
    execute(replace(cell, lr=rung(first_rung(cell)), seed=SEEDS[0]), own_device=True)


def transfer(cell: Run, execute: Execute) -> None:
    """The rate found at `SOURCE` in another shape, and from there on that shape's own best rate; seed 0."""
    source = best_rung(replace(cell, **SOURCE, num_experts=8), execute, (1,))
    best_rung(cell, execute, (1,), first=source)


def untrained(cell: Run, execute: Execute) -> None:
    """What all runs start from."""
    execute(replace(cell, lr=0.0, seed=SEEDS[0]))


def cell(size: str, device: str, task: str, method: str, **options: Any) -> Run:
    """A run whose seed and learning rate are open."""
    steps, batch = SIZES[size][task]
    return Run(task=task, method=method, seed=-1, lr=0.0, steps=steps, batch=batch, device=device, **options)


def plan(size: str = "full", device: str = "cpu") -> Iterator[tuple[str, list[Job]]]:
    """The studies by name, in order."""

    def jobs(procedure: Callable[..., None], task: str, methods: tuple[str, ...], **options: Any) -> list[Job]:
        return [(procedure, cell(size, device, task, method, **options)) for method in methods]

    yield "on this device", jobs(on_this_device, "mawps", ON_BOTH)
    first = [*jobs(untrained, "mawps", ("AdamW",)), *jobs(tuned, "mawps", ("SGD",)), *jobs(tuned_near, "mawps", MAIN)]
    yield "MAWPS, k = 2", first
    yield "MAWPS, more methods", jobs(tuned_near, "mawps", MORE)
    yield "GOAT", jobs(tuned_near, "mawps", ("AdamW", "Muon"), start="goat")
    yield "several skills", jobs(tuned_near, "skills", USUAL)
    yield "transfer", [job for shape in FAR for job in jobs(transfer, "mawps", TRANSFER_METHODS, **shape)]
    yield "all experts, k = E", jobs(tuned_near, "mawps", ("RAdamW", "gRAdamW (full)"), top_k=8)
    yield "k = E / 2", jobs(tuned_near, "mawps", ("AdamW",), top_k=4)
    yield "GSM8K", jobs(tuned_near, "gsm8k", USUAL)
    yield "(20, 10, 4)", jobs(known, "mawps", ON_BOTH, num_experts=20, top_k=10)
    yield "routers at a thousandth", jobs(tuned_near, "mawps", ("AdamW",), gate_lr_scale=1e-3)
    nearer = [job for shape in NEARER for job in jobs(transfer, "mawps", ("AdamW", "Muon"), **shape)]
    yield "transfer, nearer shapes", nearer
    yield "all experts, k = E, with SGD", jobs(tuned_near, "mawps", ("RSGD", "gRSGD (full)"), top_k=8)


def short(size: str = "full", device: str = "cpu") -> Iterator[tuple[str, list[Job]]]:
    """`make reproduce`: AdamW, LoRA and Muon on MAWPS, one seed at the rates that the study found: rows that it has."""
    yield "MAWPS, in short", [(known, cell(size, device, "mawps", method)) for method in SHORT]
