"""Bytes of experts on each rank: parameters, gradients and optimizer state, measured on a DeepSpeed engine.

    OMP_NUM_THREADS=1 python benchmarks/memory_expert_parallel.py                    # 4 ranks, ZeRO 1 and 2
    OMP_NUM_THREADS=1 python benchmarks/memory_expert_parallel.py --precision bf16

Starts real processes (gloo). Only experts are trained, so that all that the engine holds is theirs. Measured in the
second step, on the rank that holds most; beside the formula, for P expert elements of b bytes in the whole model, N
ranks and ep = ep_size:

    parameters    b P / ep             ZeRO 1 and 2 do not shard them, expert parallelism does
    accumulating  b P / ep, ZeRO 2: b P / N      gradients between the micro-batches of a step
    gradients     b P / N              before the step, reduced: 1 / (N / ep), ZeRO's share, of 1 / ep
    state         (4 + 4 + 4) P / N    likewise: the fp32 copy of the weights and AdamW's two moments
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

FEATURES, LAYERS, EXPERTS, RANK = 256, 4, 16, 8
ELEMENTS = LAYERS * EXPERTS * RANK * 2 * FEATURES
KINDS = ("parameters", "accumulating", "gradients", "state")
SIZES = {"fp32": 4, "bf16": 2}


class Net(nn.Module):
    """A stack of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x).float().square().mean()}


def formula(stage: int, ep_size: int, world: int, precision: str) -> dict[str, float]:
    """Bytes per rank, by kind."""
    size, local, share = SIZES[precision], ELEMENTS / ep_size, ELEMENTS / world
    return dict(
        zip(KINDS, (size * local, size * (local if stage == 1 else share), size * share, 12 * share), strict=True)
    )


def measure(stage: int, ep_size: int, precision: str) -> dict[str, int]:
    """On every rank: bytes of expert tensors that an engine holds in its second step, by kind."""
    import deepspeed
    from peft import get_peft_model

    import ds_moelora

    adapter = ds_moelora.MoELoRAConfig(r=RANK, num_experts=EXPERTS, target_modules=r"layers\.\d", ep_size=ep_size)
    model = get_peft_model(Net(), adapter)
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith(("lora_A", "lora_B")))
    experts = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=experts, config=config)
    dtype = next(engine.module.parameters()).dtype
    zero, gradients = engine.optimizer, []
    for _ in range(4):  # two steps of two micro-batches: the optimizer's state exists from the first step on
        engine.backward(engine(torch.randn(32, FEATURES, dtype=dtype))["loss"])
        gradients.append(memory([[p.grad for p in experts], zero.averaged_gradients, zero.all_grad_tensors]))
        engine.step()
    state = memory([zero.single_partition_of_fp32_groups, dict(zero.optimizer.state)])
    engine.destroy()
    return dict(zip(KINDS, (memory(experts), *gradients[2:], state), strict=True))


def memory(value: Any) -> int:
    """Bytes of all tensors inside; parts of one buffer once, and not the parts of it that nobody refers to."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in tensors(value):
        if tensor.dim() > 0:  # not AdamW's step count
            seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors(entry)


def serve(rank: int, world: int, folder: str, cases: list[tuple[int, int, str]]) -> None:
    """One rank of `torch.multiprocessing.spawn`; rank 0 pickles the largest of the ranks, by case."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {}
    for case in cases:
        found = torch.tensor(list(measure(*case).values()))
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        results[case] = dict(zip(KINDS, found.tolist(), strict=True))
    if rank == 0:
        Path(folder, "results").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--precision", choices=list(SIZES), default="fp32")
    arguments = parser.parse_args()
    sizes = [n for n in (1, 2, 4, 8, 16) if arguments.ranks % n == 0]
    cases = [(stage, ep_size, arguments.precision) for stage, ep_size in itertools.product((1, 2), sizes)]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (arguments.ranks, folder, cases), nprocs=arguments.ranks)
        results = pickle.loads(Path(folder, "results").read_bytes())
    of = f"{ELEMENTS:,} expert elements, {arguments.precision}, {arguments.ranks} ranks"
    print(f"\nKB per rank, measured / formula; {of}\n")
    print("| ZeRO | ep_size | " + " | ".join(KINDS) + " | all before the step |")
    print("|---|---|" + "---|" * 5)
    for (stage, ep_size, precision), found in results.items():
        expected = formula(stage, ep_size, arguments.ranks, precision)
        pairs = [(found[kind], expected[kind]) for kind in KINDS]
        pairs.append(tuple(sum(each[kind] for kind in KINDS if kind != "accumulating") for each in (found, expected)))
        cells = " | ".join(f"{measured / 1024:,.0f} / {wanted / 1024:,.0f}" for measured, wanted in pairs)
        print(f"| {stage} | {ep_size} | {cells} |")


if __name__ == "__main__":
    main()
