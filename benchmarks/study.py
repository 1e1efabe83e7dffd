"""What the studies of optimizers share: a ladder of learning rates, the search on it, and a CSV file that resumes.

A *cell* is a run (a frozen dataclass) whose seed and learning rate are left open. All methods are tuned on one ladder,
in steps of 10^(1/4), by one rule: from a first rung go to the better side until both sides are worse, by the training
loss of the seed 0. So no optimum lies at an edge, and a method whose steps are longer gains nothing by it. The tuned
rate is then run with the seeds 1, 2, 3, which are the ones that are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .harness import ENVIRONMENT, RESULTS, Row, environment, read_rows

TUNING_SEED = 0
SEEDS = (1, 2, 3)
MOST_RUNGS = 40
Outcome = dict[str, Any]
Execute = Callable[..., Outcome]  # of a run, and perhaps own_device=True
Job = tuple[Callable[[Any, Execute], None], Any]  # a procedure and its cell
Plan = list[tuple[str, list[Job]]]  # studies by name, in order


def rung(number: int) -> float:
    """A learning rate of the ladder: 10^(number / 4), to three digits."""
    return float(f"{10 ** (number / 4):.3g}")


def rung_number(lr: float) -> int:
    """The number of a rung."""
    return round(4 * math.log10(lr))


def tune(cell: Any, execute: Execute, first: int, strides: tuple[int, ...] = (2, 1)) -> int:
    """The rung with the least training loss for the seed 0, both of whose neighbours were tried.

    Args:
        first: the rung to begin at. strides: of the searches, one after the other; the last is 1.

    Raises:
        RuntimeError: the loss went on falling for `MOST_RUNGS` rungs.
    """
    losses: dict[int, float] = {}
    best = first
    for stride in strides:
        settled = False
        while not settled:
            near = (best, best - stride, best + stride)  # the first wins a tie
            for number in near:
                if number not in losses:
                    losses[number] = execute(replace(cell, lr=rung(number), seed=TUNING_SEED))["train_loss"]
            if len(losses) > MOST_RUNGS:
                raise RuntimeError(f"{cell}: no least loss among {len(losses)} learning rates.")
            found = min(near, key=lambda number: losses[number])
            settled = found == best and math.isfinite(losses[best])
            best = found if math.isfinite(losses[found]) else best - stride  # all of them diverged
    return best


def reported(cell: Any, execute: Execute, lr: float) -> None:
    """The reported seeds."""
    for seed in SEEDS:
        execute(replace(cell, lr=lr, seed=seed))


class RunsFile:
    """The CSV file: calling it with a run gives the run's outcome, from the file or by running it.

    The file is replaced as a whole after every run, so that it is complete whenever the study is killed. A run that
    any device did is not done again, unless it is asked for on its own device.

    Args:
        path: the file; rows that it has stay. run_type: the dataclass of runs. outcomes: columns. work: does a run.
        device: where.
    """

    def __init__(
        self, path: Path, run_type: type, outcomes: tuple[str, ...], work: Execute | None = None, device: str = "cpu"
    ) -> None:
        self.inputs = tuple(field.name for field in fields(run_type))
        self.columns = ("study", *self.inputs, *outcomes, *ENVIRONMENT)
        self.path, self.work, self.lock = path, work, threading.Lock()
        self.environment = environment(device)
        self.rows = read_rows(path)
        if self.rows and tuple(self.rows[0]) != self.columns:
            raise ValueError(f"{path} has other columns than this benchmark writes: pass another --output.")
        self.runs: dict[tuple[str, ...], Future] = {}
        for row in self.rows:
            future: Future = Future()
            future.set_result({"train_loss": float(row["train_loss"])})
            self.runs[self.key(row)] = self.runs[self.key(row, own_device=True)] = future

    def key(self, values: Row | dict[str, Any], own_device: bool = False) -> tuple[str, ...]:
        """What a run is looked up by: all that its outcome depends on beyond rounding."""
        return tuple(str(values[name]) for name in self.inputs if own_device or name != "device")

    def known(self, run: Any, own_device: bool = False) -> Outcome | None:
        """The outcome of a run that the file has."""
        future = self.runs.get(self.key(vars(run), own_device))
        return None if future is None else future.result()

    def __call__(self, run: Any, study: str = "", own_device: bool = False) -> Outcome:
        key = self.key(vars(run), own_device)
        with self.lock:
            known = self.runs.get(key)
            future = known or self.runs.setdefault(key, Future())
        if known is not None:
            return known.result()
        assert self.work is not None
        try:
            outcome = self.work(run)
        except BaseException as error:
            future.set_exception(error)
            raise
        row = {"study": study, **vars(run), **outcome, **self.environment}
        with self.lock:
            self.rows.append({name: str(row.get(name, "")) for name in self.columns})
            self.write()
        future.set_result(outcome)
        print(f"{study}: {run.task} {run.method} k={run.top_k} E={run.num_experts} r={run.r} lr={run.lr:g} "
              f"seed={run.seed}: {outcome['train_loss']:.4f}, {outcome.get('test_accuracy', '')}, "
              f"{outcome['seconds']} s", flush=True)  # fmt: skip
        return outcome

    def write(self) -> None:
        """Replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)


class OutOfTime(Exception):  # noqa: N818 (no error)
    """No further run is to be started."""


def run_all(plan: Plan, file: RunsFile, workers: int, seconds: float) -> None:
    """All jobs in order, `workers` at a time; no run is started after `seconds`."""
    start = time.monotonic()

    def do(study: str, procedure: Callable[..., None], cell: Any) -> None:
        def run(run: Any, own_device: bool = False) -> Outcome:
            if time.monotonic() - start > seconds:
                raise OutOfTime
            return file(run, study, own_device)

        with contextlib.suppress(OutOfTime):  # what is missing is run the next time
            procedure(cell, run)

    with ThreadPoolExecutor(workers) as threads:  # each waits for the process that does its run
        jobs = [threads.submit(do, name, *job) for name, jobs in plan for job in jobs]
        for job in jobs:
            job.result()


class Sketch:
    """Stands in for `execute`: counts what is still to be run, if every search ends where it begins."""

    def __init__(self, file: RunsFile, first_rung: Callable[[Any], int]) -> None:
        self.file, self.first_rung, self.missing = file, first_rung, set[tuple[str, ...]]()

    def __call__(self, run: Any, own_device: bool = False) -> Outcome:
        found = self.file.known(run, own_device)
        if found is None:
            self.missing.add(self.file.key(vars(run), own_device))
            distance = abs(rung_number(run.lr) - self.first_rung(run)) if run.lr else 0
            found = {"train_loss": 1 + distance / MOST_RUNGS}
        return found


def estimate(plan: Plan, file: RunsFile, first_rung: Callable[[Any], int], sample: Callable[[Any], Outcome]) -> float:
    """Prints, and returns, the hours that what is missing takes one core, from a short sample of each task.

    Args:
        sample: `seconds` of a few of a run's `steps`.
    """
    costs: dict[str, tuple[float, float]] = {}
    total, sketch = 0.0, Sketch(file, first_rung)
    for name, jobs in plan:
        seconds, number = 0.0, 0
        for procedure, run in jobs:
            before = len(sketch.missing)
            procedure(run, sketch)
            missing = len(sketch.missing) - before
            if not missing:
                continue
            if run.task not in costs:
                start = time.process_time()
                found = sample(run)
                rest = time.process_time() - start - found["seconds"]
                costs[run.task] = found["seconds"] / found["steps"], rest
                print(f"{run.task}: {costs[run.task][0]:.2f} s per step of {run.batch}, {rest:.1f} s for the model and "
                      "its evaluation", flush=True)  # fmt: skip
            number += missing
            seconds += missing * (run.steps * costs[run.task][0] + costs[run.task][1])
        total += seconds
        print(f"{name}: at least {number} runs, {seconds / 3600:.2f} hours", flush=True)
    print(f"together: {total / 3600:.1f} hours of one core")
    return total / 3600


def compare(file: RunsFile, committed: list[Row]) -> None:
    """Prints how far the training losses of runs that the committed file has, too, are from it."""
    there = {file.key(row): float(row["train_loss"]) for row in committed}
    pairs = [(float(row["train_loss"]), there[file.key(row)]) for row in file.rows if file.key(row) in there]
    others = [abs(a / b - 1) for a, b in pairs if a != b]
    print(f"{len(pairs)} of {len(file.rows)} runs are in the committed file as well: {len(pairs) - len(others)} equal "
          f"to the bit, the others within {max(others, default=0.0):.1e} relative")  # fmt: skip


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every study; `name` names its CSV file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.csv", help="the CSV file (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after that long")
    parser.add_argument("--only", nargs="+", help="names of studies")
    parser.add_argument("--tiny", action="store_true", help="two steps per run, for tests")
    parser.add_argument("--estimate", action="store_true", help="print how long it would take, and stop")
    return parser


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, plan: Iterator[tuple[str, list[Job]]]) -> Plan:
    """The studies that `--only` names."""
    studies = dict(plan)
    unknown = set(args.only or ()) - set(studies)
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(studies)}")
    return [(name, jobs) for name, jobs in studies.items() if not args.only or name in args.only]


@contextlib.contextmanager
def workers(count: int, execute: Callable[[Any, Any], Outcome], sources: Any) -> Iterator[Execute]:
    """Does runs, in `count` processes or (one) in this one, on one thread; a ValueError ends the program."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context) if count > 1 else None
    try:
        yield (lambda run: pool.submit(execute, run, sources).result()) if pool else lambda run: execute(run, sources)
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        torch.set_num_threads(threads)
        if pool is not None:
            pool.shutdown(cancel_futures=True)
