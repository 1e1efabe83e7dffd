"""Which runs the study consists of, the most telling first, so that it may be cut off anywhere.

Learning rates lie on one ladder, 10^(n/4), and are tuned by `convergence.studies.tune`: every optimum has a rung on
both sides that is no better, by the training loss of seed 0. The seeds 1, 2, 3 at that rate are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..convergence.studies import SEEDS, TUNING_SEED, Execute, rung, rung_number, tune
from .runs import METHODS, Run

SIZES = {  # (steps, batch)
    "full": {"mawps": (48, 8), "gsm8k": (48, 4), "skills": (64, 8)},
    "tiny": {"mawps": (4, 2), "gsm8k": (2, 2), "skills": (2, 4)},
}
# Rungs at which the search begins; they affect how many runs it takes.
FIRST_RUNGS = {"SGD": -8, "RSGD": -8, "AdamW": -10, "Muon": -3, "LoRA": -12}
FAILED_LOSS = 3.0  # more than any task's before training: such a run counts as diverged
MAIN = ("AdamW", "LoRA, AdamW", "gRAdamW (sqrt)", "RAdamW", "Muon", "gMuon (full)", "gRSGD (sqrt)", "RSGD", "SGD")
MORE = ("LoRA+, AdamW", "gRAdamW (full)", "gMuon (sqrt)", "gRSGD (full)")
SHORT_LIST = ("AdamW", "LoRA, AdamW", "gRAdamW (sqrt)", "Muon")
UNEVEN = ("RSGD", "gRSGD (full)", "RAdamW", "gRAdamW (full)")
HALF = 15  # layers of SmolLM2-135M
VALLEY = (-4, -2, 2, 4)  # rungs beside the best
SOURCE = {"r": 4, "layers": HALF}
TRANSFERS: tuple[dict[str, int], ...] = (
    {"r": 4, "layers": 0},
    *({"r": r, "layers": HALF} for r in (2, 8, 32)),
    *({"r": 4, "layers": HALF, "num_experts": E} for E in (2, 16)),
)
TRANSFER_METHODS = ("AdamW", "gRAdamW (sqrt)", "Muon")
NEAR = (0, -2, 2)  # rungs beside the source's best
Job = tuple[Callable[[Run, Execute], None], Run]


def first_rung(method: str) -> int:
    """Where the search for a method's rate begins."""
    kinds = (("LoRA", "LoRA"), ("Muon", "Muon"), ("AdamW", "AdamW"), ("RSGD", "RSGD"), ("SGD", "SGD"))
    return FIRST_RUNGS[next(kind for part, kind in kinds if part in method)]


def best_rung(cell: Run, execute: Execute) -> int:
    """The tuned one. A run that ends worse than it began is no minimum, however its neighbours do."""

    def finite(run: Run) -> dict[str, Any]:
        outcome = execute(run)
        return {"train_loss": math.inf if outcome["train_loss"] > FAILED_LOSS else outcome["train_loss"]}

    return tune(cell, finite, first_rung(cell.method))


def tuned(cell: Run, execute: Execute) -> None:
    """The search, then the reported seeds."""
    best = rung(best_rung(cell, execute))
    for seed in SEEDS:
        execute(replace(cell, lr=best, seed=seed))


def valley(cell: Run, execute: Execute) -> None:
    """Seed 0 further from the tuned rate."""
    best = best_rung(cell, execute)
    for distance in VALLEY:
        execute(replace(cell, lr=rung(best + distance), seed=TUNING_SEED))


def transfer(cell: Run, execute: Execute) -> None:
    """The rate found at `SOURCE`, and rungs beside it, in another shape; seed 0."""
    best = best_rung(replace(cell, **SOURCE, num_experts=8), execute)
    for distance in NEAR:
        execute(replace(cell, lr=rung(best + distance), seed=TUNING_SEED))


def untrained(cell: Run, execute: Execute) -> None:
    """What all runs start from."""
    execute(replace(cell, lr=0.0, seed=SEEDS[0]))


def cell(size: str, device: str, task: str, method: str, **options: Any) -> Run:
    """A run whose seed and learning rate are open."""
    steps, batch = SIZES[size][task]
    return Run(task=task, method=method, seed=-1, lr=0.0, steps=steps, batch=batch, device=device, **options)


def plan(size: str = "full", device: str = "cpu") -> Iterator[tuple[str, list[Job]]]:
    """The studies by name, in order."""

    def cells(task: str, methods: tuple[str, ...], **options: Any) -> list[Run]:
        return [cell(size, device, task, method, **options) for method in methods]

    start: Job = (untrained, cell(size, device, "mawps", "AdamW"))
    yield "MAWPS, k = 2", [start, *((tuned, run) for run in cells("mawps", MAIN))]
    yield "MAWPS, more methods", [(tuned, run) for run in cells("mawps", MORE)]
    yield "several skills", [(tuned, run) for run in cells("skills", SHORT_LIST)]
    yield "all experts, k = E", [(tuned, run) for run in cells("mawps", UNEVEN, top_k=8)]
    yield "GOAT", [(tuned, run) for run in cells("mawps", ("AdamW", "Muon"), start="goat")]
    mixed = ("AdamW", "gRAdamW (sqrt)", "Muon")
    yield "k = E / 2", [(tuned, run) for run in cells("mawps", mixed, top_k=4)]
    shapes = [cells("mawps", TRANSFER_METHODS, **shape) for shape in TRANSFERS]
    yield "transfer", [(transfer, run) for runs in shapes for run in runs]
    yield "GSM8K", [(tuned, run) for run in cells("gsm8k", SHORT_LIST)]
    yield "routers at a thousandth", [(tuned, run) for run in cells("mawps", mixed, gate_lr_scale=1e-3)]
    yield "width of the valley", [(valley, run) for run in cells("mawps", MAIN)]
    paper = {"num_experts": 20, "top_k": 10}
    yield "(20, 10, 4)", [(tuned, run) for run in cells("mawps", ("AdamW", "gRAdamW (sqrt)"), **paper)]


def short(size: str = "full", device: str = "cpu") -> Iterator[tuple[str, list[Job]]]:
    """`make reproduce`: AdamW and Muon on MAWPS."""
    yield "MAWPS, k = 2", [(tuned, cell(size, device, "mawps", method)) for method in ("AdamW", "Muon")]


def expected_runs(procedure: Callable[..., None]) -> int:
    """How many runs a job takes: about six rungs to tune."""
    return {untrained: 1, valley: 3, transfer: 3}.get(procedure, 6 + len(SEEDS))


__all__ = ["METHODS", "plan", "rung_number", "short"]
