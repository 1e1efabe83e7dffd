"""What the balance loss keeps of the routers' decisions under gradient checkpointing: peak memory with and without it.

  python -m benchmarks.router_memory        # 8,192 tokens, 64 experts, 28 layers of 7 adapted modules

A narrow model, so that (tokens, experts) tensors are what is large; each figure is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ds_moelora import MoELoRAConfig

SEQUENCES, LENGTH, EXPERTS = 8, 1024, 64


def step(layers: int, coef: float) -> float:
    """Forward and backward; the process's peak in MB beyond what it had before."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    adapter = MoELoRAConfig(
        task_type="CAUSAL_LM", num_experts=EXPERTS, r=1, target_modules="all-linear", router_aux_loss_coef=coef
    )
    model = get_peft_model(base, adapter).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 64, (SEQUENCES, LENGTH))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(input_ids=ids, labels=ids).loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--coef", type=float, help="one measurement, in this process")
    args = parser.parse_args()
    if args.coef is not None:
        print(f"{step(args.layers, args.coef):.0f}")
        return
    for coef in (0.0, 1e-3):
        command = [sys.executable, "-m", "benchmarks.router_memory", "--layers", str(args.layers), "--coef", str(coef)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        print(f"router_aux_loss_coef={coef}: peak {found} MB", flush=True)


if __name__ == "__main__":
    main()
