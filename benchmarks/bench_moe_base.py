"""LoRA on the stacked experts of a MoE base: `use_lora_experts` against PEFT's own function.

    python benchmarks/bench_moe_base.py [--experts 64] [--tokens 512] [--repeats 5] [--dtype float32]

One experts module with both parameters adapted, forward and backward. Each way runs in a process of its own: time is
the median of the repeats, extra memory the rise of the process's peak resident memory during them (CUDA: of allocated
memory) over what the module, its inputs and the base alone (adapter disabled, forward) need. Widths are reduced.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

# hidden, intermediate, chosen experts, number of experts as published
SHAPES = {"mixtral": (256, 896, 2, 8), "qwen3_moe": (256, 96, 8, 128), "gpt_oss": (360, 360, 4, 32)}


def experts_module(shape: str, experts: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    hidden, inner, _, _ = SHAPES[shape]
    common = {"hidden_size": hidden, "intermediate_size": inner, "experts_implementation": "grouped_mm"}
    made = {
        "mixtral": lambda: MixtralExperts(MixtralConfig(num_local_experts=experts, **common)),
        "qwen3_moe": lambda: Qwen3MoeExperts(
            Qwen3MoeConfig(num_experts=experts, moe_intermediate_size=inner, **common)
        ),
        "gpt_oss": lambda: GptOssExperts(GptOssConfig(num_local_experts=experts, **common)),
    }[shape]()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return made.to(device, dtype)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    from ds_moelora import use_lora_experts

    torch.manual_seed(0)
    hidden, _, k, _ = SHAPES[arguments.shape]
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, arguments.dtype)
    holder = torch.nn.Module()
    holder.experts = experts_module(arguments.shape, arguments.experts, dtype, device)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=8, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(holder, config)
    if arguments.way == "ours":
        use_lora_experts(model)
    experts = model.base_model.model.experts
    x = torch.randn(arguments.tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    gates, index = torch.rand(arguments.tokens, arguments.experts, device=device).softmax(-1).topk(k)
    gates = gates.to(dtype).requires_grad_()

    def run() -> float:
        start = time.perf_counter()
        experts(x, index, gates).square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    with torch.no_grad():
        experts.get_base_layer()(x, index, gates)
    before = peak()
    run()
    return {"ms": 1000 * statistics.median(run() for _ in range(arguments.repeats)), "MiB": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, help="default: 64, and as published")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=["peft", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    print("| shape | E | k | PEFT ms | ours ms | time | PEFT extra MiB | ours extra MiB | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape, (_, _, k, published) in SHAPES.items():
        for experts in [arguments.experts] if arguments.experts else sorted({64, published}):
            found = []
            for way in ("peft", "ours"):
                options = {"experts": experts, "shape": shape, "way": way}
                options |= {name: getattr(arguments, name) for name in ("tokens", "repeats", "dtype")}
                command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(out.splitlines()[-1]))
            peft, ours = found
            print(
                f"| {shape} | {experts} | {k} | {peft['ms']:.0f} | {ours['ms']:.0f} | {ours['ms'] / peft['ms']:.2f} "
                f"| {peft['MiB']:.0f} | {ours['MiB']:.0f} | {ours['MiB'] / peft['MiB']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
