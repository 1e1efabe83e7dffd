"""README's table: what PEFT's LoRA and mixtures of LoRA experts reach, and cost, on a real language model.

    python -m benchmarks.smollm2 outputs/smollm2
    python -m benchmarks.first_table --data DATA          # DATA: a folder with mawps.train.jsonl (docs/data.md)

Scores and speed (on a GPU that 14 processes shared) are the study's, three seeds at each method's own best rate
(docs/language_model.md; `python -m benchmarks.bench_language_model` makes them). Memory is measured here, as the
largest resident set of a process that trains `configs/recipes/recommended.yaml` with other flags through the launcher,
8 problems per step. Rows that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import csv
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

from .harness import ROOT, read_rows
from .language_model.report import Study, entry

REPOSITORY = ROOT.parent
RECIPE = "configs/recipes/recommended.yaml"
LORA = ["--lora_alpha", "64", "--learning_rate", "1e-3"]
# Name -> the study's method, the script, and what differs from the recipe.
ROWS: dict[str, tuple[str, str, list[str]]] = {
    "PEFT LoRA r = 32, AdamW 1e-3": ("LoRA, AdamW", "benchmarks/train_lora.py", LORA),
    "MoE-LoRA, GateRiemannianAdamW 3e-3": ("gRAdamW (sqrt)", "launch/train.py", ["--deepspeed", "configs/zero2.json"]),
    "MoE-LoRA, AdamW 3e-3: `recommended.yaml`": ("AdamW", "launch/train.py", []),
}
FIELDS = ("setting", "peak_gb", "steps", "hardware", "date")
SHOWN = ("setting", "right answers, %", "test loss", "tokens/s", "peak GB")
TOKENS = 177_026 / 1_859  # of a problem with its answer and the chat template, mean over MAWPS


def run(command: list[str], log: Path) -> float:
    """Runs a command; returns its largest resident set in GB.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss / 2**20


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row of the file."""
    _, script, flags = ROWS[name]
    data = ["--model_name_or_path", str(args.model.resolve())]
    data += ["--dataset_name", str((args.data / "mawps.train.jsonl").resolve()), "--output_dir", str(folder)]
    size = ["--per_device_train_batch_size", "8", "--max_steps", str(args.steps), "--logging_steps", "1"]
    rest = ["--save_strategy", "no", "--report_to", "none", "--overwrite_output_dir"]
    command = [sys.executable, script, "--config", RECIPE, *data, *size, *rest, *flags]
    peak = run(command, folder / "train.log")
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return dict(zip(FIELDS, (name, f"{peak:.3f}", args.steps, hardware, date.today().isoformat()), strict=True))


def show(rows: list[dict[str, Any]]) -> str:
    """README's rows: the study's scores beside what was measured here."""
    study, lines = Study(read_rows(ROOT / "results" / "language_model.csv")), []
    for row in sorted(rows, key=lambda row: list(ROWS).index(row["setting"])):
        cell = study.cell("mawps", ROWS[row["setting"]][0])
        scores = entry(cell, "test_accuracy", 100, 1), entry(cell, "test_loss")
        seen = [TOKENS * int(run["batch"]) * int(run["steps"]) for run in cell.reported]
        speed = sum(seen) / sum(float(run["seconds"]) for run in cell.reported)
        lines.append((row["setting"], *scores, f"{speed:,.0f}", f"{float(row['peak_gb']):.2f}"))
    return table("", SHOWN, lines, "markdown").removeprefix(":").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of mawps.train.jsonl")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "first_table.csv")
    parser.add_argument("--steps", type=int, default=1, help="of each run (%(default)s)")
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
    print(show(rows))


if __name__ == "__main__":
    main()
