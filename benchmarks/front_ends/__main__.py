"""`make front-ends`: the front ends' own programs on two CPU processes, compared with their runs without DeepSpeed.

    python -m benchmarks.front_ends [--environments DIR] [--only NAME ...] [--stages N ...] [--missing] [--output CSV]

Every run trains a tiny Llama for 4 steps. Its adapter is compared with that of the same run in DDP, where the optimizer
sees whole matrices (loops: with plain PyTorch in one process). `deviation` is the largest ||x - y|| / ||y|| over the
adapter's tensors; `from AdamW` is the same between the unsharded run and one with AdamW.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import assets
from .table import COLUMNS, render

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "front-ends"
LIMIT = 300.0  # seconds
VERSIONS = ("transformers", "peft", "accelerate", "deepspeed", "torch")
TORCHRUN = "torchrun --nproc_per_node 2 --master_port 0 --rdzv_backend c10d --rdzv_endpoint localhost:0"
HYPER = f"--max_steps {assets.STEPS} --learning_rate {assets.LR} --adam_epsilon {assets.EPS}"
TRAINING = f"{HYPER} --per_device_train_batch_size 2 --bf16 false --use_cpu --report_to none --save_strategy no"
LORA = "--use_peft --lora_r 3 --lora_alpha 6 --lora_dropout 0 --lora_target_modules q_proj up_proj"
ALGORITHMS = {
    "sft": "",
    "dpo": "",
    "kto": "",
    "grpo": "--num_generations 2 --max_completion_length 8",
}


STAGES = {"LoRA": (2, 3), "MoE-LoRA": (2,)}


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        front_end: as users call it, with the package's name where it differs. environment: its virtual environment.
        what: what was run. adapter: "LoRA" or "MoE-LoRA".
        stages: of ZeRO. command: with {stage} and {out}; reference: without DeepSpeed, with {out}.
        adamw: the reference with AdamW; "": the reference with UNSHARDED=AdamW in its environment.
        saved: the adapter's folder below {out}.
        before: a command that is run once before.
    """

    front_end: str
    environment: str
    what: str
    adapter: str
    stages: tuple[int, ...]
    command: str
    reference: str
    adamw: str = ""
    saved: str = "."
    before: str = ""
    package: str = ""

    @property
    def name(self) -> str:
        return f"{self.front_end}-{self.what}-{self.adapter}".replace(" ", "_").replace("/", "_")


def trl_cases() -> Iterator[Case]:
    """TRL's own scripts with LoRA, and a script with MoE-LoRA."""
    for algorithm, flags in ALGORITHMS.items():
        flags = f"{TRAINING} {flags} --output_dir {{out}}"
        data = f"assets/{algorithm}"
        reward = " --reward_funcs rewards.distinct" if algorithm == "grpo" else ""
        script = (
            f"-m trl.scripts.{algorithm} --model_name_or_path assets/model --dataset_name {data} {LORA}{reward} {flags}"
        )
        zero = "--deepspeed assets/stage{stage}.json"
        yield Case(
            "TRL",
            "trl",
            f"python -m trl.scripts.{algorithm}",
            "LoRA",
            (0, 1, 2, 3) if algorithm == "sft" else (2, 3),
            f"{TORCHRUN} {script} {zero}",
            f"{TORCHRUN} {HERE}/unsharded.py {script}",
        )
        script = f"{HERE}/trl_moe.py {algorithm} assets/model {data} {flags}"
        yield Case(
            "TRL",
            "trl",
            f"{algorithm.upper()}Trainer(peft_config=...)",
            "MoE-LoRA",
            (2, 3) if algorithm == "sft" else (2,),
            f"{TORCHRUN} {script} {zero}",
            f"{TORCHRUN} {HERE}/unsharded.py {script}",
        )


def llamafactory_cases() -> Iterator[Case]:
    """`llamafactory-cli train`, and a mixture from an untrained folder."""
    for adapter in ("LoRA", "MoE-LoRA"):
        start = " adapter_name_or_path=start use_reentrant_gc=false" if adapter == "MoE-LoRA" else ""
        arguments = f"{HERE}/llamafactory.yaml output_dir={{out}}{start}"
        yield Case(
            "LLaMA-Factory",
            "llamafactory",
            "llamafactory-cli train" + (" from init-adapter" if start else ""),
            adapter,
            STAGES[adapter],
            f"llamafactory-cli train {arguments} deepspeed=assets/stage{{stage}}.json",
            f"{TORCHRUN} {HERE}/unsharded.py -m llamafactory.launcher {arguments}",
            before=INIT if start else "",
            package="llamafactory",
        )


INIT = (
    "python -m ds_moelora init-adapter --model assets/model --output start --r 3 --num_experts 3 --lora_alpha 6 "
    "--target_modules q_proj up_proj"
)


def swift_cases() -> Iterator[Case]:
    """`swift sft` with the plugin: LoRA, a mixture by the plugin's tuner, and one from an untrained folder."""
    common = (
        "swift sft --model assets/model --model_type llama --template default --lora_rank 3 --lora_alpha 6 "
        "--lora_dropout 0 --target_modules q_proj up_proj --torch_dtype float32 --dataset assets/messages.jsonl "
        f"{HYPER} --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1 --weight_decay 0 "
        "--lr_scheduler_type linear --warmup_ratio 0 --max_length 128 --split_dataset_ratio 0 --output_dir {out} "
        "--add_version false --report_to none --dataset_num_proc 1 --dataloader_num_workers 0 --use_cpu true --fp16 "
        f"false --bf16 false --use_hf true --external_plugins {HERE}/swift_plugin.py"
    )
    for adapter, what, tuner in (
        ("LoRA", "swift sft --optimizer", "--tuner_type lora"),
        ("MoE-LoRA", "swift sft --tuner_type moelora", "--tuner_type moelora"),
        ("MoE-LoRA", "swift sft --adapters from init-adapter", "--tuner_type moelora --adapters start"),
    ):
        reentrant = "" if adapter == "LoRA" else ' --gradient_checkpointing_kwargs {"use_reentrant":false}'
        plain = f"{common} {tuner}{reentrant}"
        yield Case(
            "ms-swift",
            "swift",
            what,
            adapter,
            STAGES[adapter],
            f"{plain} --optimizer gate_riemannian_adamw --deepspeed assets/no_block{{stage}}.json",
            f"{plain} --optimizer gate_riemannian_adamw",
            adamw=f"{plain} --optim adamw_torch",
            saved=f"checkpoint-{assets.STEPS}",
            before=INIT if "adapters" in what else "",
            package="ms-swift",
        )


def axolotl_cases() -> Iterator[Case]:
    """`axolotl.cli.train` with the plugin: LoRA, `adapter: moelora`, and a mixture from an untrained folder."""
    for adapter, what, flags in (
        ("LoRA", "adapter: lora", "--adapter lora"),
        ("MoE-LoRA", "adapter: moelora", "--adapter moelora"),
    ):
        script = f"-m axolotl.cli.train {HERE}/axolotl.yaml --output-dir {{out}} {flags}"
        yield Case(
            "axolotl",
            "axolotl",
            what,
            adapter,
            STAGES[adapter],
            f"{TORCHRUN} {script} --deepspeed assets/stage{{stage}}.json",
            f"{TORCHRUN} {HERE}/unsharded.py {script}",
        )


def loop_cases() -> Iterator[Case]:
    """Trainer, accelerate, Lightning and DeepSpeed's own loop."""
    for kind, adapter in (("lora", "LoRA"), ("moe", "MoE-LoRA")):
        plain = f"python {HERE}/plain_loop.py {kind} {{out}}"
        adamw = f"{plain} AdamW"
        script = f"{HERE}/trainer.py {kind} {TRAINING} --output_dir {{out}}"
        zero = "--deepspeed assets/stage{stage}.json"
        yield Case(
            "transformers",
            "trl",
            "Trainer",
            adapter,
            STAGES[adapter],
            f"{TORCHRUN} {script} {zero}",
            f"{TORCHRUN} {HERE}/unsharded.py {script}",
        )
        yield Case(
            "accelerate",
            "trl",
            "Accelerator, DummyOptim",
            adapter,
            STAGES[adapter],
            f"accelerate launch --config_file assets/accelerate{{stage}}.json {HERE}/accelerate_loop.py {kind} {{out}}",
            plain,
            adamw,
        )
        for front_end, environment, what, command in (
            ("Lightning", "lightning", "DeepSpeedStrategy", f"python {HERE}/lightning_fit.py"),
            ("DeepSpeed", "trl", "deepspeed.initialize", f"{TORCHRUN} {HERE}/deepspeed_loop.py"),
        ):
            yield Case(
                front_end,
                environment,
                what,
                adapter,
                STAGES[adapter],
                f"{command} {{stage}} {kind} {{out}}",
                plain,
                adamw,
            )


def all_cases() -> list[Case]:
    """In the order of how many people use the front end."""
    return [*trl_cases(), *llamafactory_cases(), *swift_cases(), *axolotl_cases(), *loop_cases()]


class Runner:
    """Runs commands in one working folder, each in its front end's environment."""

    def __init__(self, environments: Path, folder: Path, reuse: bool) -> None:
        self.environments, self.folder, self.reuse = environments, folder, reuse
        self.references: dict[tuple[str, str], Path] = {}

    def run(self, case: Case, command: str, name: str, **variables: str) -> Path:
        """The folder of the adapter that a command wrote.

        Raises:
            RuntimeError: as `execute`, or there is none.
        """
        out = self.folder / "runs" / name
        shutil.rmtree(out, ignore_errors=True)
        log = self.execute(case.environment, command.replace("{out}", str(out)), name, **variables)
        if not (out / case.saved / "adapter_model.safetensors").is_file():
            raise RuntimeError(f"no adapter in {out / case.saved}; {log}: {log.read_text()[-600:]}")
        return out / case.saved

    def execute(self, environment: str, command: str, name: str, **variables: str) -> Path:
        """Runs a command; what it printed is in the file that is returned.

        Raises:
            RuntimeError: with the end of that output.
        """
        folder, log = self.environments / environment, self.folder / "runs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{HERE}:{HERE / 'cpu'}:{HERE.parents[1]}",
            # An extension is built for one environment's DeepSpeed; in a common folder they rebuild it in turn.
            "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            # The user's cache of datasets has locks that other programs can hold.
            "HF_HOME": str(self.folder / "huggingface"),
            "AXOLOTL_DO_NOT_TRACK": "1",
            "FORCE_TORCHRUN": "1",
            "NPROC_PER_NODE": "2",
            "MOELORA": json.dumps({"num_experts": assets.NUM_EXPERTS}),
            **variables,
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                command.split(), cwd=self.folder, env=env, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                process.terminate()  # launchers end their workers, which have sessions of their own
                code = process.wait()
        if code:
            raise RuntimeError(f"exit code {code}; {log}: {log.read_text()[-600:]}")
        return log

    def before(self, case: Case) -> None:
        """Runs `case.before`, if what it makes is not there."""
        if case.before and not (self.folder / "start").exists():
            env = {**os.environ, "PATH": f"{self.environments / case.environment / 'bin'}:{os.environ['PATH']}"}
            subprocess.run(case.before.split(), cwd=self.folder, env=env, check=True)

    def reference(self, case: Case, optimizer: str) -> Path:
        """The adapter of the unsharded run; run once per command."""
        command = case.adamw if optimizer == "AdamW" and case.adamw else case.reference
        key = (f"{case.environment} {command}", optimizer)
        if key not in self.references:
            name = f"{case.name}-unsharded-{optimizer}"
            saved = self.folder / "runs" / name / case.saved
            if not (self.reuse and (saved / "adapter_model.safetensors").is_file()):
                saved = self.run(case, command, name, UNSHARDED=optimizer)
            self.references[key] = saved
        return self.references[key]

    @functools.cache  # noqa: B019  one runner per process
    def versions(self, environment: str, package: str) -> str:
        """ "peft 0.18.1, ..." of an environment."""
        code = "import sys, importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
        names = dict.fromkeys((*([package] if package else []), *VERSIONS))
        python = self.environments / environment / "bin" / "python"
        return subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout.strip()


def deviation(a: Path, b: Path) -> float:
    """max over tensors of ||x - y|| / ||y||.

    Raises:
        RuntimeError: the adapters have not the same tensors.
    """
    x, y = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    if x.keys() != y.keys():
        raise RuntimeError(f"{a} and {b} differ in {sorted(x.keys() ^ y.keys())}")
    pairs = [(x[name].double(), y[name].double()) for name in x]
    return max(float((p - q).norm() / q.norm().clamp_min(1e-30)) for p, q in pairs)


def measure(runner: Runner, case: Case, stage: int) -> dict[str, str]:
    """One row; `deviation` is "failed" if a run of it did."""
    row = {
        "front_end": case.front_end,
        "what": case.what,
        "adapter": case.adapter,
        "stage": str(stage),
        "processes": "2",
        "versions": runner.versions(case.environment, case.package or PACKAGES.get(case.front_end, "")),
        "date": datetime.date.today().isoformat(),
    }
    start = time.perf_counter()
    try:
        runner.before(case)
        reference = runner.reference(case, assets.OURS)
        plain = runner.reference(case, "AdamW")
        command, name = case.command.replace("{stage}", str(stage)), f"{case.name}-stage{stage}"
        found = runner.run(case, command, name, FRONT_ENDS_STAGE=str(stage))
        row |= {"deviation": f"{deviation(found, reference):.1e}", "from_adamw": f"{deviation(plain, reference):.1e}"}
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr, flush=True)
        row |= {"deviation": "failed", "from_adamw": ""}
    print(*(row[name] for name in COLUMNS[:7]), f"{time.perf_counter() - start:.0f} s", sep=" | ", flush=True)
    return row


def measure_lm_eval(runner: Runner) -> dict[str, str]:
    """The row of lm_eval: relative deviation of its log perplexity from PEFT's own forward passes, base and mixture."""
    row = {**LM_EVAL, "processes": "1", "date": datetime.date.today().isoformat(), "from_adamw": ""}
    row["versions"] = runner.versions("trl", "lm_eval")
    try:
        case = next(case for case in all_cases() if case.what.startswith("SFTTrainer"))
        adapter = runner.reference(case, assets.OURS)
        log = runner.execute("trl", f"python {HERE}/evaluation.py assets {adapter}", "evaluation")
        deviations = []
        for name, peft in (("base", ""), ("adapter", f",peft={adapter}")):
            out = runner.folder / "runs" / f"lm_eval-{name}"
            shutil.rmtree(out, ignore_errors=True)
            task = f"--tasks say --include_path {HERE}/tasks --device cpu --batch_size 4 --output_path {out}"
            model = f"lm_eval --model hf --model_args pretrained=assets/model{peft}"
            runner.execute("trl", f"{model} {task}", f"lm_eval-{name}")
            (results,) = out.rglob("results_*.json")
            found = math.log(json.loads(results.read_text())["results"]["say"]["perplexity,none"])
            (line,) = [line for line in log.read_text().splitlines() if line.startswith(f"{name} ")]
            expected = math.log(float(line.split()[1]))
            print(f"lm_eval, {name}: log perplexity {found:.6f}, by PEFT's forward passes {expected:.6f}")
            deviations.append(abs(found - expected) / abs(expected))
        row["deviation"] = f"{max(deviations):.1e}"
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        row["deviation"] = "failed"
    return row


LM_EVAL = {"front_end": "lm_eval", "what": "lm_eval --model hf", "adapter": "MoE-LoRA", "stage": ""}


def record(path: Path, row: dict[str, str]) -> list[dict[str, str]]:
    """Puts a row into the CSV, in the order of `all_cases`, and returns all rows."""
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {tuple(r[name] for name in COLUMNS[:4]): r for r in [*rows, row]}
    order = {(case.front_end, case.what, case.adapter): i for i, case in enumerate(all_cases())}
    order[tuple(LM_EVAL[name] for name in COLUMNS[:3])] = len(order)
    kept = sorted((key for key in done if key[:3] in order), key=lambda key: (order[key[:3]], key[3]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(done[key] for key in kept)
    return [done[key] for key in kept]


PACKAGES = {"TRL": "trl", "axolotl": "axolotl", "Lightning": "lightning", "accelerate": "accelerate"}


def main() -> int:
    """Runs what was asked for; returns 1 if a run in the CSV failed or deviates by more than 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=BUILD / "environments")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where runs are kept")
    parser.add_argument("--only", nargs="+", default=[], help="words that a run's name has in it, in any case")
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--reuse", action="store_true", help="keep unsharded runs of an earlier call")
    parser.add_argument("--missing", action="store_true", help="only what the CSV has no result of; implies --reuse")
    parser.add_argument("--output", type=Path, help="CSV; rows of other runs in it are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    assets.write(args.folder / "assets")
    shutil.rmtree(args.folder / "start", ignore_errors=True)
    runner = Runner(args.environments.absolute(), args.folder.absolute(), args.reuse or args.missing)
    output = args.output or args.folder / "front_ends.csv"
    kept = list(csv.DictReader(output.open())) if output.exists() else []
    done = {tuple(r[name] for name in COLUMNS[:4]) for r in kept if args.missing and r["deviation"] != "failed"}
    for case in all_cases():
        if args.only and not any(word.lower() in case.name.lower() for word in args.only):
            continue
        if not (args.environments / case.environment).is_dir():
            print(f"{case.name}: there is no environment {case.environment}", file=sys.stderr)
            continue
        for stage in case.stages:
            if stage in args.stages and (case.front_end, case.what, case.adapter, str(stage)) not in done:
                kept = record(output, measure(runner, case, stage))
    if (not args.only or "lm_eval" in args.only) and tuple(LM_EVAL.values()) not in done:
        kept = record(output, measure_lm_eval(runner))
    print(render(kept))
    return int(any(row["deviation"] == "failed" or float(row["deviation"]) > 1e-4 for row in kept))


if __name__ == "__main__":
    sys.exit(main())
