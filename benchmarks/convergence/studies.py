"""Which runs each study consists of, and how a learning rate is tuned.

A *cell* is a `Run` whose seed and learning rate are left open. All methods are tuned on one ladder of learning rates,
in steps of 10^(1/4), by one rule: beginning at the method's usual rung, go two rungs to the better side until both
sides are worse, by the training loss of the seed 0; then the same rung by rung. So no optimum lies at an edge, and a
method whose steps are longer gains nothing by it. The tuned rate is then run with the seeds 1, 2, 3, which are the ones
that are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .runs import METHODS, Run

TUNING_SEED = 0
SEEDS = (1, 2, 3)
MOST_RUNGS = 40
# Where the search begins: (plain SGD, preconditioned SGD, AdamW). It affects how many runs it takes.
FIRST_RUNGS = {"boolq": (4, 2, -7), "openbookqa": (0, -3, -7), "skills": (0, -2, -7)}
PAPERS = [name for name in METHODS if name != "gRAdamW (full)"]
PLAIN_AND_GATED = ["SGD", "gRSGD (sqrt)", "AdamW", "gRAdamW (sqrt)"]
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
        "skills": Size(2, 4, 48, 0),
    },
    "medium": {
        "boolq": Size(40, 16, 160, 1),
        "openbookqa": Size(40, 8, 160, 1),
        "skills": Size(120, 16, 3000, 0),
    },
    "long": {
        "boolq": Size(600, 16, 3200, 6),
        "openbookqa": Size(600, 8, 3200, 6),
        "skills": Size(1200, 64, 15000, 0),
    },
}


def rung(number: int) -> float:
    """A learning rate of the ladder: 10^(number / 4), to three digits."""
    return float(f"{10 ** (number / 4):.3g}")


def rung_number(lr: float) -> int:
    """The number of a rung."""
    number = 0
    while rung(number) < lr:
        number += 1
    while rung(number) > lr:
        number -= 1
    return number


def cell(size: str, task: str, method: str, **options: Any) -> Run:
    """A run whose seed and learning rate are open; its size is that of the task."""
    chosen = SIZES[size][task]
    if task == "skills":
        options = {"num_experts": 6, "gate_lr_scale": 1.0, "aux_loss": 1e-3, **options}
    return Run(task=task, method=method, seed=-1, lr=0.0, **vars(chosen), **options)


Execute = Callable[[Run], dict[str, Any]]


def tune(open_run: Any, execute: Execute, first: int | None = None, strides: tuple[int, ...] = (2, 1)) -> int:
    """The rung with the least training loss for the seed 0, both of whose neighbours were tried.

    Args:
        first: the rung to begin at; None: the task's. strides: of the searches, one after the other.

    Raises:
        RuntimeError: the loss went on falling for `MOST_RUNGS` rungs.
    """
    losses: dict[int, float] = {}
    best = first
    if best is None:
        best = FIRST_RUNGS[open_run.task][2 if "Adam" in open_run.method else open_run.method != "SGD"]
    for stride in strides:
        settled = False
        while not settled:
            near = (best, best - stride, best + stride)  # the first wins a tie
            for number in near:
                if number not in losses:
                    losses[number] = execute(replace(open_run, lr=rung(number), seed=TUNING_SEED))["train_loss"]
            if len(losses) > MOST_RUNGS:
                raise RuntimeError(f"{open_run}: no least loss among {len(losses)} learning rates.")
            found = min(near, key=lambda number: losses[number])
            settled = found == best and math.isfinite(losses[best])
            best = found if math.isfinite(losses[found]) else best - stride  # all of them diverged
    return best


def tuned(open_run: Run, execute: Execute) -> None:
    """Tunes a cell and runs it with the reported seeds."""
    best = rung(tune(open_run, execute))
    for seed in SEEDS:
        execute(replace(open_run, lr=best, seed=seed))


def spread(open_run: Run, execute: Execute) -> None:
    """A tuned cell with the learning rates around the best one, for all reported seeds."""
    best = tune(open_run, execute)
    for number in SPREAD:
        for seed in SEEDS:
            execute(replace(open_run, lr=rung(best + number), seed=seed))


def untrained(open_run: Run, execute: Execute) -> None:
    """What a cell starts from: the same runs with a learning rate of 0."""
    for seed in SEEDS:
        execute(replace(open_run, lr=0.0, seed=seed))


Job = tuple[Callable[[Run, Execute], None], Run]


def papers(size: str, task: str, top_k: int, start: str = "kaiming", methods: list[str] = PAPERS) -> list[Run]:
    """The papers' methods on one task; with top_k=1 also the one that only the control needs."""
    control = ["gRAdamW (full)"] if top_k == 1 and methods is PAPERS else []
    return [cell(size, task, method, top_k=top_k, start=start) for method in [*methods, *control]]


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


def skills(size: str, methods: list[str] = PAPERS) -> list[Run]:
    """The causal language model with trained routers."""
    return [cell(size, "skills", method) for method in methods]


def frozen_routers(size: str) -> list[Run]:
    """The same with the papers' learning rate for the routers, a thousandth."""
    return [cell(size, "skills", method, gate_lr_scale=1e-3) for method in ("AdamW", "gRAdamW (sqrt)")]


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
    untrained_skills: Job = (untrained, cell(size, "skills", "AdamW"))
    yield "skills", [untrained_skills, *((tuned, run) for run in skills(size, PLAIN_AND_GATED[::-1]))]
    yield main("boolq", 2, "goat")
    yield main("boolq", 4)
    yield "experts", [(tuned, run) for run in experts(size)]
    yield main("openbookqa", 8)
    yield main("openbookqa", 1)
    yield main("openbookqa", 2, "goat")
    yield main("openbookqa", 4)
    yield "damping, openbookqa", [(tuned, run) for run in damping(size, "openbookqa")]
    yield "skills, other methods", [(tuned, run) for run in skills(size) if run.method not in PLAIN_AND_GATED]
    yield "skills, frozen routers", [(tuned, run) for run in frozen_routers(size)]
    for top_k in (1, 4, 8) if size == "long" else ():
        yield from (main(task, top_k, "goat") for task in ENCODER_TASKS)


def short(size: str) -> Iterator[tuple[str, list[Job]]]:
    """What `make reproduce` runs: plain and gate-scaled at top_k 2 on all three tasks, and the control at top_k 1."""
    runs = [run for task in ENCODER_TASKS for run in papers(size, task, 2, methods=PLAIN_AND_GATED)]
    yield "main, top_k 2", [(tuned, run) for run in runs]
    control = ["RSGD", "gRSGD (sqrt)", "gRSGD (full)"]
    yield "control, top_k 1", [(tuned, run) for run in papers(size, ABLATION_TASK, 1, methods=control)]
    yield "skills", [(tuned, run) for run in skills(size, PLAIN_AND_GATED[2:])]
