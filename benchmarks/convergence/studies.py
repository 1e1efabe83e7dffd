"""Which runs the study of the encoder consists of; how rates are tuned: `benchmarks.study`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..study import Execute, Job, reported, rung, tune
from .runs import METHODS, Run

# Where the search begins: (plain SGD, preconditioned SGD, AdamW). It affects how many runs it takes.
FIRST_RUNGS = {"boolq": (4, 2, -7), "openbookqa": (0, -3, -7)}
PAPERS = [name for name in METHODS if name != "gRAdamW (full)"]
ENCODER_TASKS = ("boolq", "openbookqa")
ABLATION_TASK = "boolq"
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)
RELATIVE_DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SECOND_LOOK = (1e-6, 1e-2)  # both absolute and relative, on the other task
TOTAL_RANK = 32
SPREAD = range(-6, 8, 2)  # rungs around the tuned one, for the sensitivity


@dataclass(frozen=True)
class Size:
    """How large a task's runs are; arguments of `Run`."""

    steps: int
    batch: int
    examples: int
    layers: int


SIZES: dict[str, dict[str, Size]] = {
    "tiny": {
        "boolq": Size(2, 4, 16, 1),
        "openbookqa": Size(2, 2, 8, 1),
    },
    "medium": {
        "boolq": Size(40, 16, 160, 1),
        "openbookqa": Size(40, 8, 160, 1),
    },
}


def cell(size: str, task: str, method: str, **options: Any) -> Run:
    """A run whose seed and learning rate are open; its size is that of the task."""
    return Run(task=task, method=method, seed=-1, lr=0.0, **vars(SIZES[size][task]), **options)


def first_rung(run: Run) -> int:
    """Where the search for a rate begins."""
    return FIRST_RUNGS[run.task][2 if "Adam" in run.method else run.method != "SGD"]


def tuned(open_run: Run, execute: Execute) -> None:
    """Tunes a cell and runs it with the reported seeds."""
    reported(open_run, execute, rung(tune(open_run, execute, first_rung(open_run))))


def spread(open_run: Run, execute: Execute) -> None:
    """A tuned cell with the learning rates around the best one, for all reported seeds."""
    best = tune(open_run, execute, first_rung(open_run))
    for number in SPREAD:
        reported(open_run, execute, rung(best + number))


def papers(size: str, task: str, top_k: int, start: str = "kaiming") -> list[Run]:
    """The papers' methods on one task; with top_k=1 also the one that only the control needs."""
    control = ["gRAdamW (full)"] if top_k == 1 else []
    return [cell(size, task, method, top_k=top_k, start=start) for method in [*PAPERS, *control]]


def damping(size: str, task: str = ABLATION_TASK) -> list[Run]:
    """Absolute and relative dampings, for both optimizers; on another task than the ablations' a few of them."""
    absolute, relative = (DAMPINGS, RELATIVE_DAMPINGS) if task == ABLATION_TASK else (SECOND_LOOK, SECOND_LOOK[1:])
    options = [{"damping": d} for d in absolute] + [{"damping": 0.0, "relative_damping": c} for c in relative]
    methods = ("gRAdamW (sqrt)", "gRSGD (sqrt)")
    return [cell(size, task, method, **option) for method in methods for option in options]


def experts(size: str) -> list[Run]:
    """E experts of rank 32 / E: equally many parameters (but for the router), and E / 4 of them per token."""
    counts = (1, 2, 4, 8, 16)
    shapes = [{"num_experts": E, "r": TOTAL_RANK // E, "top_k": max(1, E // 4)} for E in counts]
    return [cell(size, ABLATION_TASK, method, **shape) for method in ("AdamW", "gRAdamW (sqrt)") for shape in shapes]


def studies(size: str) -> Iterator[tuple[str, list[Job]]]:
    """All of them, the most telling first: a long run may be stopped anywhere."""

    def main(task: str, top_k: int, start: str = "kaiming") -> tuple[str, list[Job]]:
        name = f"{task}, top_k {top_k}" + (", goat" if start == "goat" else "")
        return name, [(tuned, run) for run in papers(size, task, top_k, start)]

    yield main("boolq", 2)
    yield main("openbookqa", 2)
    yield "damping", [(tuned, run) for run in damping(size)]
    yield main("boolq", 8)
    yield main("boolq", 1)
    yield "sensitivity", [(spread, cell(size, ABLATION_TASK, method)) for method in PAPERS]
    yield main("boolq", 2, "goat")
    yield main("boolq", 4)
    yield "experts", [(tuned, run) for run in experts(size)]
    yield main("openbookqa", 8)
    yield main("openbookqa", 1)
    yield main("openbookqa", 2, "goat")
    yield main("openbookqa", 4)
    yield "damping, openbookqa", [(tuned, run) for run in damping(size, "openbookqa")]
