"""LoRA on the stacked experts of a MoE base: `use_lora_experts` against PEFT's own function.

    python benchmarks/bench_moe_base.py [--experts 64] [--tokens 512] [--repeats 9] [--dtype float32] [--published]

One experts module with both parameters adapted, forward and backward. Each way runs in --rounds processes of its own,
in turn. Time is the median of all repeats: on a CPU, CPU time of one thread, which other processes do not lengthen; on
CUDA wall time. Extra memory is the rise of the process's peak resident memory (CUDA: of allocated memory) over what the
module, its inputs and the base alone (without adapter, forward) need. Widths are an eighth (Mixtral: a sixteenth) of
the published ones, or with --published those. Deviation: of outputs and gradients, relative to the largest element of
each. On CUDA in bf16, ours runs once with torch's error for every wait for the device.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# As published: hidden, intermediate, chosen experts, number of experts; and by what the widths are divided.
SHAPES = {
    "mixtral": (4096, 14336, 2, 8, 16),
    "qwen3_moe": (2048, 768, 8, 128, 8),
    "gpt_oss": (2880, 2880, 4, 32, 8),
}
COLUMNS = ("shape", "E", "k", "tokens", "dtype", "hidden", "intermediate")


def experts_module(
    shape: str, hidden: int, inner: int, experts: int, dtype: torch.dtype, device: str
) -> torch.nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    common = {"hidden_size": hidden, "intermediate_size": inner, "experts_implementation": "grouped_mm"}
    with torch.device(device):
        made = {
            "mixtral": lambda: MixtralExperts(MixtralConfig(num_local_experts=experts, **common)),
            "qwen3_moe": lambda: Qwen3MoeExperts(
                Qwen3MoeConfig(num_experts=experts, moe_intermediate_size=inner, **common)
            ),
            "gpt_oss": lambda: GptOssExperts(GptOssConfig(num_local_experts=experts, **common)),
        }[shape]().to(dtype)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return made


def widths(arguments: argparse.Namespace) -> tuple[int, int]:
    hidden, inner, _, _, divisor = SHAPES[arguments.shape]
    return (hidden, inner) if arguments.published else (hidden // divisor, inner // divisor)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    from ds_moelora import use_lora_experts

    torch.manual_seed(0)
    torch.set_num_threads(1)
    k, (hidden, inner) = SHAPES[arguments.shape][2], widths(arguments)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, arguments.dtype)
    holder = torch.nn.Module()
    holder.experts = experts_module(arguments.shape, hidden, inner, arguments.experts, dtype, device)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=8, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(holder, config)
    if arguments.way == "ours":
        use_lora_experts(model)
    experts = model.base_model.model.experts
    x = torch.randn(arguments.tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    gates, index = torch.rand(arguments.tokens, arguments.experts, device=device).softmax(-1).topk(k)
    gates = gates.to(dtype).requires_grad_()
    clock = time.perf_counter if device == "cuda" else time.process_time

    def run() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        experts(x, index, gates).square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (clock() - start)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        experts.get_base_layer()(x, index, gates)
    before = peak()
    run()
    times = [run() for _ in range(arguments.repeats)]
    found: dict[str, Any] = {"ms": times, "MiB": peak() - before}
    if arguments.way == "ours":
        found["deviation"] = deviation(experts, (x, index, gates))
        if device == "cuda" and dtype == torch.bfloat16:
            torch.cuda.set_sync_debug_mode("error")
            experts(x, index, gates).square().sum().backward()
            torch.cuda.set_sync_debug_mode("default")
    return found


def deviation(experts: Any, inputs: tuple[torch.Tensor, ...]) -> float:
    """Largest difference of output and gradients between the two ways, relative to the largest element of each."""
    results = []
    config = experts.get_base_layer().config
    for implementation in ("grouped_mm", config._experts_implementation):
        config._experts_implementation = implementation
        experts.zero_grad()
        out = experts(*inputs)
        leaves = [inputs[0], inputs[2], *(p for p in experts.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True))


def one_process(arguments: argparse.Namespace, **options: Any) -> dict[str, Any]:
    options |= {name: getattr(arguments, name) for name in ("tokens", "repeats", "dtype")}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    command += ["--published"] * arguments.published
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(finished.stderr[-4000:])
    return json.loads(finished.stdout.splitlines()[-1])


def row(arguments: argparse.Namespace, shape: str, experts: int) -> dict[str, Any]:
    arguments.shape = shape
    hidden, inner = widths(arguments)
    values = (shape, experts, SHAPES[shape][2], arguments.tokens, arguments.dtype, hidden, inner)
    result: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
    found: dict[str, list[dict[str, Any]]] = {"peft": [], "ours": []}
    for way in ("peft", "ours") * arguments.rounds:
        found[way].append(one_process(arguments, shape=shape, experts=experts, way=way))
    for way, runs in found.items():
        times = statistics.quantiles([ms for run in runs for ms in run["ms"]], n=4)
        result |= {f"{way} ms": round(times[1], 2), f"{way} ms q1": round(times[0], 2)}
        result |= {f"{way} ms q3": round(times[2], 2), f"{way} extra MiB": round(min(run["MiB"] for run in runs), 1)}
    result["deviation"] = f"{max(run['deviation'] for run in found['ours']):.0e}"
    result["time"] = round(result["ours ms"] / result["peft ms"], 2)
    result["memory"] = round(result["ours extra MiB"] / result["peft extra MiB"], 2)
    return result


def processor_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, 1 thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, help="default: 64, and as published")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--published", action="store_true", help="the published widths (for GPUs)")
    parser.add_argument("--output", help="a CSV file to which rows are added")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--way", choices=["peft", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    about = {"device": device, "date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv])}
    about |= {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    shown = (*COLUMNS[:4], "peft ms", "ours ms", "time", "peft extra MiB", "ours extra MiB", "memory", "deviation")
    print(f"{about}\n| {' | '.join(shown)} |\n{'|---' * len(shown)}|")
    for shape in [arguments.shape] if arguments.shape else SHAPES:
        published = SHAPES[shape][3]
        for experts in [arguments.experts] if arguments.experts else sorted({64, published}):
            result = row(arguments, shape, experts)
            print(f"| {' | '.join(str(result[name]) for name in shown)} |", flush=True)
            if arguments.output:
                is_new = not Path(arguments.output).exists()
                with open(arguments.output, "a", newline="") as file:
                    writer = csv.DictWriter(file, [*result, *about], lineterminator="\n")
                    if is_new:
                        writer.writeheader()
                    writer.writerow(result | about)


if __name__ == "__main__":
    main()
