"""What monitoring costs: `python -m benchmarks.bench_logging [--short]`.

A Llama of 57 M parameters (random weights) with a mixture of E experts of rank r and GateRiemannianAdamW under ZeRO-2
takes steps that are reported (statistics of routers, experts and optimizer, the all-reduce, the scalars in an event
file) and steps that are not, in turns, in the same processes. `ratio` is that of a reported step, in CPU time
of rank 0, which also writes. The launcher reports one step in ten: a step costs `per_step_at_10` more on average.

    python -m benchmarks.bench_logging --ranks 1 --device cuda     # one GPU, without DeepSpeed
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch.utils.tensorboard import SummaryWriter
from transformers import LlamaConfig, LlamaForCausalLM

from ds_moelora import GateRiemannianAdamW, MoELoRAConfig
from ds_moelora.monitoring.meter import TrainingMeter

from .harness import Results, arguments

WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """One mixture, and how it is trained. `tokens` per rank and step, in sequences of 512."""

    experts: int
    top_k: int
    rank: int
    ranks: int
    tokens: int
    device: str


def adapted_model(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    adapter = MoELoRAConfig(
        r=case.rank, num_experts=case.experts, top_k=case.top_k, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(LlamaForCausalLM(config), adapter).train().to(case.device)


def training_step(case: Case, model: torch.nn.Module) -> tuple[Callable[[], None], Any]:
    """One step, and the optimizer (or engine) that takes it."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    ids = torch.randint(0, 512, (max(case.tokens // 512, 1), min(case.tokens, 512)), device=case.device)
    params = [p for p in model.parameters() if p.requires_grad]
    if case.ranks == 1:
        optimizer = GateRiemannianAdamW(params, lr=1e-4)

        def alone() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return alone, optimizer

    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": len(ids),
        "optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=params, config=config)

    def together() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return together, engine


def interleaved(case: Case, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of every step, by contender; on every rank alike, since only the number of rounds decides."""
    model = adapted_model(case)
    step, optimizer = training_step(case, model)
    meter, writer = TrainingMeter(model, optimizer), SummaryWriter(folder)

    def reported() -> None:
        meter.arm()
        step()
        report = meter.step_done()
        assert report is not None
        if case.ranks == 1 or dist.get_rank() == 0:
            for tag, value in report.scalars.items():
                writer.add_scalar(tag, value)

    contenders = {"off": step, "reported": reported}
    clock = time.perf_counter if case.device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(WARM_UP + rounds):
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            if case.ranks > 1:
                dist.barrier()
            start = clock()
            contenders[name]()
            if case.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: found[WARM_UP:] for name, found in seconds.items()}


def serve(rank: int, case: Case, rounds: int, folder: str) -> None:
    """One rank; rank 0 pickles its times."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    found = interleaved(case, rounds, f"{folder}/events-{rank}")
    if rank == 0:
        Path(folder, "results").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_case(case: Case, rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        if case.ranks == 1:
            return interleaved(case, rounds, folder)
        mp.spawn(serve, (case, rounds, folder), nprocs=case.ranks)
        return pickle.loads(Path(folder, "results").read_bytes())


def main() -> None:
    parser = arguments(__doc__, "logging")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    results = Results(args.output, tuple(Case.__dataclass_fields__), ("per_step_at_10",), args.fresh, args.device)
    for experts, top_k, rank in [(8, 2, 4)] if args.short else [(8, 2, 4), (20, 10, 4)]:
        case = Case(experts, top_k, rank, args.ranks, args.tokens, args.device)
        if results.has(asdict(case)):
            continue
        samples = measure_case(case, 7 if args.short else args.rounds)
        ratios = sorted(b / a for a, b in zip(samples["off"], samples["reported"], strict=True))
        per_step = (ratios[len(ratios) // 2] - 1) / 10
        results.add(asdict(case), "off", samples, {"reported": {"per_step_at_10": f"{per_step:.4f}"}})


if __name__ == "__main__":
    main()
