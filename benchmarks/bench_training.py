"""Whole training runs against PEFT's LoRA: `python -m benchmarks.bench_training [--short]`.

`deepspeed launch/train.py` trains a Llama of 57 M parameters (random weights, bytes for tokens) with a mixture of E
experts of rank r and GateRiemannianAdamW; the peer trains it with PEFT's LoRA of rank E r and torch's AdamW, through
the same launcher, data and DeepSpeed config (ZeRO-2). The runs take turns. Ratios are of seconds per token; `peak_mb`
is the largest resident set of one process, start-up included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.cluster.processes import find_free_port
from launch.demo.base import byte_tokenizer

from .harness import ROOT, Results, arguments, set_heap

OPTIMIZERS = {
    "peft": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "ours": {"type": "GateRiemannianAdamW", "params": {"lr": "auto"}},
}
SCRIPTS = {"peft": ROOT / "train_lora.py", "ours": ROOT.parent / "launch" / "train.py"}
STEPS = 8


@dataclass(frozen=True)
class Case:
    """One mixture, and how it is trained. `tokens` per rank and micro-batch."""

    experts: int
    top_k: int
    rank: int
    ranks: int
    tokens: int
    checkpointing: bool


SHORT = [Case(20, 10, 4, 1, 512, False)]
FULL = [*SHORT, Case(20, 10, 4, 1, 512, True), Case(20, 10, 4, 2, 512, False), Case(8, 2, 4, 1, 512, False)]


def write_model(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, length: int) -> Path:
    """Rows that fill `length` tokens each."""
    rows = [{"prompt": f"{i:08d} ", "completion": "abcdefgh" * (length // 8)} for i in range(256)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(case: Case, contender: str, folder: Path, round_: int) -> tuple[float, float]:
    """One training run: seconds per token, and the largest resident set in MB."""
    config = json.loads((ROOT.parent / "configs" / "zero2.json").read_text())
    config["optimizer"] = OPTIMIZERS[contender]
    (folder / f"{contender}.json").write_text(json.dumps(config))
    output = folder / f"{contender}-{round_}"
    bin_folder = Path(sys.executable).parent
    command = [
        str(bin_folder / "deepspeed"), "--master_port", str(find_free_port()), "--num_gpus", str(case.ranks),
        str(SCRIPTS[contender]), "--deepspeed", str(folder / f"{contender}.json"),
        "--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl"),
        "--output_dir", str(output), "--max_steps", str(STEPS), "--save_strategy", "no", "--report_to", "none",
        "--per_device_train_batch_size", "1", "--max_length", str(case.tokens), "--learning_rate", "1e-4",
        "--num_experts", str(case.experts), "--top_k", str(case.top_k), "--lora_r", str(case.rank),
        "--gradient_checkpointing", str(case.checkpointing), "--logging_steps", str(STEPS),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
    environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
    log = output.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT.parent, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{contender} failed:\n{log.read_text()[-3000:]}")
    summary = json.loads((output / "train_summary.json").read_text())
    return 1 / summary["tokens_per_second"], usage.ru_maxrss / 1024


def measure_case(case: Case, results: Results, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_rows(folder / "rows.jsonl", case.tokens)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
        for round_ in range(rounds):
            for contender in list(found)[:: 1 if round_ % 2 == 0 else -1]:
                found[contender].append(run(case, contender, folder, round_))
    extras = {
        name: {
            "tokens_per_second": f"{1 / statistics.median(seconds for seconds, _ in runs):.1f}",
            "peak_mb": f"{statistics.median(peak for _, peak in runs):.0f}",
        }
        for name, runs in found.items()
    }
    results.add(asdict(case), "peft", {name: [seconds for seconds, _ in runs] for name, runs in found.items()}, extras)


def main() -> None:
    parser = arguments(__doc__, "training")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    args = parser.parse_args()
    set_heap(args.heap)
    results = Results(args.output, tuple(Case.__dataclass_fields__), ("tokens_per_second", "peak_mb"), fresh=args.fresh)
    started = time.monotonic()
    for case in SHORT if args.short else FULL:
        if results.has(asdict(case)):
            continue
        if time.monotonic() - started > args.seconds:
            break
        measure_case(case, results, 2 if args.short else args.rounds)


if __name__ == "__main__":
    main()
