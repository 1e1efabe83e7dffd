"""The tables of docs/convergence.md, each a function of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .. import study
from . import studies
from .results import Cell, Cells, Difference, mean_and_deviation, numbers
from .runs import Run

TASKS = {"boolq": "BoolQ", "openbookqa": "OpenBookQA"}
TOP_K = (1, 2, 4, 8)
PAIRS = (
    ("RSGD", "SGD"),
    ("gRSGD (sqrt)", "SGD"),
    ("gRSGD (sqrt)", "RSGD"),
    ("gRSGD (full)", "RSGD"),
    ("RAdamW", "AdamW"),
    ("gRAdamW (sqrt)", "RAdamW"),
    ("gRAdamW (sqrt)", "AdamW"),
    ("gRAdamW (sqrt)", "gRSGD (sqrt)"),
)


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Markdown, without the rows that are empty but for their first entry."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows if any(entry != "-" for entry in row[1:])]
    return "\n".join(lines)


def with_lr(cell: Cell, column: str = "train_loss") -> str:
    """Mean, deviation and the tuned learning rate."""
    text = mean_and_deviation(cell.values(column))
    return text if text == "-" else f"{text} ({cell.lr:g})"


def progress(cells: Cells, size: str) -> str:
    """How much of each study the file has."""

    def rows() -> Iterator[Sequence[str]]:
        for name, jobs in studies.studies(size):
            done = sum(complete(cells, procedure, run) for procedure, run in jobs)
            yield name, f"{done} of {len(jobs)}"

    return table(("study", "cells that are complete"), rows())


def complete(cells: Cells, procedure: Callable[..., None], run: Run) -> bool:
    """Whether the file has all reported runs of a job."""
    cell = cells[run]
    if procedure is studies.spread:
        best = None if cell.lr is None else study.rung_number(cell.lr)
        rates = [] if best is None else [study.rung(best + n) for n in studies.SPREAD]
        return bool(rates) and all(len(cell.at(lr)) == len(study.SEEDS) for lr in rates)
    return bool(cell.reported)


def methods(cells: Cells, size: str, column: str = "train_loss", start: str = "kaiming") -> str:
    """A figure of every method on both tasks."""

    def rows() -> Iterator[Sequence[str]]:
        for task in studies.ENCODER_TASKS:
            for method in studies.PAPERS:
                found = [cells[studies.cell(size, task, method, top_k=k, start=start)] for k in TOP_K]
                yield f"{TASKS[task]}, {method}", *(with_lr(cell, column) for cell in found)

    return table(("task, method", *(f"k = {k}" for k in TOP_K)), rows())


def differences(cells: Cells, size: str, column: str = "train_loss", start: str = "kaiming") -> str:
    """Paired differences between methods."""

    def rows() -> Iterator[Sequence[str]]:
        for task in studies.ENCODER_TASKS:
            for a, b in PAIRS:
                found = [[cells[studies.cell(size, task, m, top_k=k, start=start)] for m in (a, b)] for k in TOP_K]
                yield f"{TASKS[task]}: {a} - {b}", *(str(Difference.of(x, y, column)) for x, y in found)

    return table(("difference", *(f"k = {k}" for k in TOP_K)), rows())


def control(cells: Cells, size: str) -> str:
    """At top_k 1: runs that differ in the gate scaling alone, and whether their curves are equal to the bit."""

    def rows() -> Iterator[Sequence[str]]:
        for task in studies.ENCODER_TASKS:
            for family in ("RSGD", "RAdamW"):
                names = (family, f"g{family} (sqrt)", f"g{family} (full)")
                found = [cells[studies.cell(size, task, name, top_k=1)] for name in names]
                groups: dict[tuple[str, str], list[tuple[str, ...]]] = {}
                for cell in found:
                    for row in cell.rows:
                        figures = tuple(row[name] for name in ("train_loss", "test_loss", "curve"))
                        groups.setdefault((row["seed"], row["lr"]), []).append(figures)
                shared = [group for group in groups.values() if len(group) == len(names)]
                equal = sum(len(set(group)) == 1 for group in shared)
                count = f"{equal} of {len(shared)}" if shared else "-"
                yield f"{TASKS[task]}: {', '.join(names)}", count

    return table(("at top_k = 1", "runs whose losses are equal to the last digit"), rows())


def goat(cells: Cells, size: str) -> str:
    """GOAT's start against the usual one."""

    def rows() -> Iterator[Sequence[str]]:
        for task in studies.ENCODER_TASKS:
            for method in studies.PAPERS:
                cell, usual = (cells[studies.cell(size, task, method, start=s)] for s in ("goat", "kaiming"))
                tests = str(Difference.of(cell, usual, "test_loss"))
                yield f"{TASKS[task]}, {method}", with_lr(cell), str(Difference.of(cell, usual)), tests

    return table(("k = 2", "GOAT: training loss (lr)", "GOAT - Kaiming", "GOAT - Kaiming, test loss"), rows())


def dense(cells: Cells, size: str) -> str:
    """All experts for every token against the k best."""

    def rows() -> Iterator[Sequence[str]]:
        for task in studies.ENCODER_TASKS:
            for method in studies.PAPERS:
                whole, *some = (cells[studies.cell(size, task, method, top_k=k)] for k in (8, 1, 2, 4))
                yield f"{TASKS[task]}, {method}", *(str(Difference.of(cell, whole)) for cell in some)

    return table(("training loss", "top 1 - dense", "top 2 - dense", "top 4 - dense"), rows())


def damping(cells: Cells, size: str) -> str:
    """Final training loss over the damping."""

    def rows() -> Iterator[Sequence[str]]:
        found: dict[str, list[str]] = {}
        for run in [run for task in studies.ENCODER_TASKS for run in studies.damping(size, task)]:
            value = f"{run.relative_damping:g} trace(G)" if run.relative_damping else f"{run.damping:g}"
            usual = cells[studies.cell(size, run.task, run.method)]
            difference = str(Difference.of(cells[run], usual))
            found.setdefault(f"{TASKS[run.task]}, {value}", []).extend([with_lr(cells[run]), difference])
        yield from ((name, *entries) for name, entries in found.items())

    adam, sgd = "gRAdamW (sqrt)", "gRSGD (sqrt)"
    return table(("task, damping d", f"{adam} (lr)", "- that of 1e-6", f"{sgd} (lr)", "- that of 1e-6"), rows())


def sensitivity(cells: Cells, size: str) -> str:
    """The final training loss at learning rates around the tuned one."""

    def rows() -> Iterator[Sequence[str]]:
        for method in studies.PAPERS:
            cell = cells[studies.cell(size, studies.ABLATION_TASK, method)]
            if not cell.reported:
                continue
            best = study.rung_number(cell.lr or 1.0)
            found = [cell.at(study.rung(best + n)) for n in studies.SPREAD]
            if all(len(rows) == len(study.SEEDS) for rows in found):
                entries = [mean_and_deviation(numbers(rows, "train_loss"), 2) for rows in found]
                yield f"{method} ({cell.lr:g})", *entries

    return table(("method (best lr)", *(f"lr x {study.rung(n):g}" for n in studies.SPREAD)), rows())


def experts(cells: Cells, size: str) -> str:
    """E experts of rank 32 / E."""

    def rows() -> Iterator[Sequence[str]]:
        found: dict[str, list[str]] = {}
        for run in studies.experts(size):
            name = f"{run.num_experts}, {run.r}, {run.top_k}"
            found.setdefault(name, []).extend([with_lr(cells[run]), mean_and_deviation(cells[run].values("test_loss"))])
        yield from ((name, *entries) for name, entries in found.items())

    return table(("E, r, k", "AdamW (lr)", "test loss", "gRAdamW (sqrt) (lr)", "test loss"), rows())


def sections(cells: Cells, size: str) -> dict[str, str]:
    """All tables, by the names of their markers in the document."""
    return {
        "progress": progress(cells, size),
        "methods": methods(cells, size),
        "differences": differences(cells, size),
        "test": methods(cells, size, "test_loss"),
        "test differences": differences(cells, size, "test_loss"),
        "control": control(cells, size),
        "goat": goat(cells, size),
        "goat differences": differences(cells, size, start="goat"),
        "damping": damping(cells, size),
        "sensitivity": sensitivity(cells, size),
        "experts": experts(cells, size),
        "dense": dense(cells, size),
    }
