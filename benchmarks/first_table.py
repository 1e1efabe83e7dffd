"""README's table: a real language model with PEFT's LoRA and with mixtures, through the launcher, one run each.

    python -m benchmarks.smollm2 outputs/smollm2
    python -m benchmarks.first_table --data DATA          # DATA: a folder with mawps.train.jsonl and mawps.test.jsonl

Every row is one run of `configs/recipes/recommended.yaml` with other flags (one process, 8 problems per step), then
`launch/evaluate.py` on held-out problems: loss per answer token, and the share of written expressions whose value is
right. `tokens/s` is per second of one core's time, which other programs do not change: tokens after the first step over
the CPU time of the process, less that of a run of one step. `peak GB` is the largest resident set of the process. Rows
that are in the file are not made again. docs/data.md says where MAWPS comes from.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ds_moelora.cli.tables import table

from .expressions import accuracy
from .harness import ROOT

REPOSITORY = ROOT.parent
RECIPE = "configs/recipes/recommended.yaml"
# Name -> script, and what differs from the recipe. Rates: each method's best in docs/language_model.md.
ROWS: dict[str, tuple[str, list[str]]] = {
    "PEFT LoRA r=32, AdamW 1e-3": ("benchmarks/train_lora.py", ["--lora_alpha", "64", "--learning_rate", "1e-3"]),
    "MoE-LoRA, GateRiemannianAdamW 3e-3": ("launch/train.py", ["--deepspeed", "configs/zero2.json"]),
    "MoE-LoRA, AdamW 3e-3: recommended.yaml": ("launch/train.py", []),
}
# A plain LoRA does not remember how it was trained.
AS_TRAINED = ("--prompt_template", "chat", "--max_length", "224", "--dtype", "bfloat16")
FIELDS = ("setting", "right", "test_loss", "problems", "tokens_per_second", "peak_gb", "steps", "hardware", "date")
SHOWN = ("setting", "right, %", "test loss", "tokens/s", "peak GB")


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Runs a command; returns its CPU seconds, and its largest resident set in GB.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row: trains, then scores."""
    script, flags = ROWS[name]
    training, held_out = (str((args.data / f"mawps.{split}.jsonl").resolve()) for split in ("train", "test"))
    data = ["--model_name_or_path", str(args.model.resolve()), "--dataset_name", training]
    size = ["--per_device_train_batch_size", "8", "--save_strategy", "no", "--report_to", "none"]
    cost, peak, tokens = {}, 0.0, {}
    for steps in (1, args.steps):
        adapter = folder / f"adapter-{steps}"
        to = ["--max_steps", str(steps), "--output_dir", str(adapter)]
        command = [sys.executable, script, "--config", RECIPE, *data, *size, *to, *flags]
        cost[steps], peak = run(command, folder / "train.log")
        tokens[steps] = json.loads((adapter / "train_summary.json").read_text())["tokens"]
    speed = (tokens[args.steps] - tokens[1]) / (cost[args.steps] - cost[1])
    written, scores = folder / "written.jsonl", folder / "scores.json"
    score = ["--score", "answers", "--answer_pattern", r"([^\n]*)", "--predictions", str(written)]
    score += ["--max_eval_samples", str(args.problems), "--max_new_tokens", "40", "--output", str(scores)]
    evaluate = [sys.executable, "launch/evaluate.py", "--adapter", str(adapter), "--dataset_name", held_out]
    run([*evaluate, *AS_TRAINED, *score], folder / "evaluate.log")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    _, right, count = accuracy((row["written"], row["reference"]) for row in rows)
    loss = json.loads(scores.read_text())["metrics"]["loss"]
    found = {"setting": name, "right": f"{right:.4f}", "test_loss": f"{loss:.4f}", "problems": count}
    found |= {"tokens_per_second": f"{speed:.1f}", "peak_gb": f"{peak:.3f}"}
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return {**found, "steps": args.steps, "hardware": hardware, "date": date.today().isoformat()}


def show(rows: list[dict[str, Any]]) -> str:
    """README's rows."""
    lines = []
    for row in rows:
        right = f"{100 * float(row['right']):.0f}"
        lines.append((row["setting"], right, f"{float(row['test_loss']):.3f}", f"{float(row['tokens_per_second']):.0f}",
                      f"{float(row['peak_gb']):.2f}"))  # fmt: skip
    return table("", SHOWN, lines, "markdown").removeprefix(":").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of mawps.*.jsonl")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "first_table.csv")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--problems", type=int, default=80, help="that are scored (%(default)s)")
    args = parser.parse_args()
    rows = list(csv.DictReader(args.output.open())) if args.output.is_file() else []
    for name in ROWS:
        if any(row["setting"] == name for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, args, Path(folder)))
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(show(rows[-1:]), flush=True)
    print(show(rows))


if __name__ == "__main__":
    main()
