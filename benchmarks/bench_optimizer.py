"""The optimizer step against torch's: `python -m benchmarks.bench_optimizer [--short] [--part NAME]`.

Part "whole" (no ZeRO), ratios of CPU time to torch's optimizer on the same stacked tensors:

    torch        torch.optim.AdamW(fused=True) or torch.optim.SGD on the 2 M tensors (E, n, r): the peer
    cpp          GateRiemannianAdamW / GateRiemannianSGD on them, kernels="cpp" (the default); ranks with kernels
    eager        the same with kernels="torch"
    loop         one pair after the other, as in published code: two inverses, two products, then torch's optimizer
    flat         torch's optimizer on the same elements as two flat tensors, for comparison

Part "zero", on real DeepSpeed engines at stage 2 with 1, 2 and 4 ranks (gloo): the step of what each rank owns, ratios
of its CPU time to torch's fused AdamW on the same flat partition. Beside it what 2 cores cannot time: rows and
floating-point operations per rank, and bytes in the one all-reduce.

Part "threads": wall time of "torch" and "cpp" with 2 threads. Part "offload": CPU time of a training step (a chain of
adapted linear layers, TOKENS tokens, ZeRO-2 with `offload_optimizer`) to the same with DeepSpeed's CPUAdam ("torch").

    floating-point operations of N rows and G Gram matrices of rank r:   4 N r^2 + 2 G r^3
    bytes that must pass: weights and gradients read, gradients written: 3 x 4 bytes per element; AdamW: 7 x 4
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import ds_moelora
from ds_moelora.optimizer.kernels.cpp import RANKS
from ds_moelora.pairs import LoraPair, tag_pair

from .harness import Results, arguments, measure, set_heap, wall_time

PARTS = ("whole", "zero", "threads", "offload")
TOKENS = 256
EXTRAS = ("rows_per_rank", "flops_per_rank", "sent_bytes")
DAMPING = 1e-6


@dataclass(frozen=True)
class Case:
    """`modules` adapted modules with n x n weights, `experts` pairs of rank `rank` each."""

    part: str
    optimizer: str
    modules: int
    experts: int
    rank: int
    features: int
    ranks: int = 1


SHORT = [
    Case("whole", "AdamW", 112, 20, 4, 1024),
    Case("whole", "SGD", 112, 20, 4, 1024),
    Case("zero", "AdamW", 112, 20, 4, 1024, ranks=1),
]
FULL = [
    *SHORT,
    *(Case("whole", "AdamW", m, 20, 4, 512) for m in (64, 112, 224, 448)),
    *(Case("whole", "AdamW", 112, e, 4, 1024) for e in (1, 4, 64)),
    *(Case("whole", "AdamW", 112, 8, r, 1024) for r in (4, 8, 16, 64)),
    *(Case("zero", "AdamW", 112, 20, 4, 1024, ranks=n) for n in (2, 4)),
    Case("threads", "AdamW", 112, 20, 4, 1024),
    Case("offload", "AdamW", 16, 20, 4, 1024),
]


class Pairs(nn.Module):
    """The factors of all modules, tagged, and nothing else."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (case.experts, case.features, case.rank)
        self.factors = nn.ParameterList()
        for number in range(case.modules):
            A, B = (nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for _ in range(2))
            tag_pair(LoraPair(name=f"module {number}", num_experts=case.experts, rank=case.rank), A, B)
            self.factors.extend([A, B])

    def with_gradients(self) -> list[nn.Parameter]:
        for p in self.factors:
            p.grad = torch.randn_like(p)
        return list(self.factors)


def torch_optimizer(name: str, params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True) if name == "AdamW" else torch.optim.SGD(params, lr=1e-4)


def our_optimizer(name: str, params: Any, kernels: str) -> torch.optim.Optimizer:
    kind: Any = ds_moelora.GateRiemannianAdamW if name == "AdamW" else ds_moelora.GateRiemannianSGD
    return kind(params, lr=1e-4, damping=DAMPING, kernels=kernels)


class PairLoop:
    """Pair by pair, from the formula, as published code does it: every expert's A and B is a tensor of its own."""

    def __init__(self, name: str, factors: list[nn.Parameter]) -> None:
        self.pairs = [
            (nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()))
            for A, B in zip(factors[::2], factors[1::2], strict=True)
            for a, b in zip(A, B, strict=True)
        ]
        params = [p for pair in self.pairs for p in pair]
        for p in params:
            p.grad = torch.randn_like(p)
        self.optimizer = (torch.optim.AdamW if name == "AdamW" else torch.optim.SGD)(params, lr=1e-4, foreach=False)
        self.identity = torch.eye(factors[0].shape[-1])

    @torch.no_grad()
    def step(self) -> None:
        for a, b in self.pairs:
            inverse_a = torch.linalg.inv(a.T @ a + DAMPING * self.identity)
            inverse_b = torch.linalg.inv(b.T @ b + DAMPING * self.identity)
            a.grad, b.grad = a.grad @ inverse_b, b.grad @ inverse_a
        self.optimizer.step()


def flat_copies(factors: list[nn.Parameter]) -> list[nn.Parameter]:
    """All A behind each other, and all B."""
    flats = [nn.Parameter(torch.cat([p.detach().view(-1) for p in factors[k::2]])) for k in range(2)]
    for p in flats:
        p.grad = torch.randn_like(p)
    return flats


def work(case: Case, elements: int, matrices: int) -> dict[str, int]:
    rows = elements // case.rank
    return {"rows_per_rank": rows, "flops_per_rank": 4 * rows * case.rank**2 + 2 * matrices * case.rank**3}


def measure_whole(case: Case, results: Results) -> None:
    eager = our_optimizer(case.optimizer, Pairs(case).with_gradients(), "torch")
    params = Pairs(case).with_gradients()
    peer, flat = torch_optimizer(case.optimizer, params), torch_optimizer(case.optimizer, flat_copies(params))
    steps = {"torch": peer.step, "eager": eager.step, "flat": flat.step}
    if case.rank in RANKS:
        steps["cpp"] = our_optimizer(case.optimizer, Pairs(case).with_gradients(), "cpp").step
    if case.features * case.modules * case.experts <= 1024 * 112 * 20:
        steps["loop"] = PairLoop(case.optimizer, params).step
    numbers = work(case, sum(p.numel() for p in params), 2 * case.modules * case.experts)
    results.add(asdict(case), "torch", measure(steps, rounds=7), {"eager": numbers})


def measure_threads(case: Case, results: Results) -> None:
    torch.set_num_threads(2)
    peer = torch_optimizer(case.optimizer, Pairs(case).with_gradients())
    cpp = our_optimizer(case.optimizer, Pairs(case).with_gradients(), "cpp")
    results.add(asdict(case), "torch", measure({"torch": peer.step, "cpp": cpp.step}, rounds=15, run=wall_time), {})
    torch.set_num_threads(1)


# ZeRO: one process per rank


def measure_offload(case: Case, results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        answers: Any = context.SimpleQueue()
        process = context.Process(target=_offloaded, args=(case, folder, answers))
        process.start()
        results.add(asdict(case), "torch", answers.get(), {})
        process.join()


def _offloaded(case: Case, folder: str, answers: Any) -> None:
    import deepspeed
    from peft import get_peft_model

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    x = torch.randn(TOKENS, case.features)
    steps = {}
    for name, kind in (("torch", "AdamW"), ("cpp", "GateRiemannianAdamW")):
        layers = [nn.Linear(case.features, case.features, bias=False) for _ in range(case.modules)]
        config = ds_moelora.MoELoRAConfig(
            num_experts=case.experts, r=case.rank, top_k=2, target_modules=r"\d+", router_aux_loss_coef=0.0
        )
        model = get_peft_model(nn.Sequential(*layers), config)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config={
                "train_micro_batch_size_per_gpu": 1,
                "optimizer": {"type": kind, "params": {"lr": 1e-4, "weight_decay": 0.0}},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
        )
        wanted = {"torch": "DeepSpeedCPUAdam", "cpp": kind}[name]
        assert type(engine.optimizer.optimizer).__name__ == wanted, type(engine.optimizer.optimizer)
        steps[name] = functools.partial(_train, engine, x)
    answers.put(measure(steps, rounds=7))
    dist.destroy_process_group()


def _train(engine: Any, x: Tensor) -> None:
    engine.backward(engine(x).square().mean())
    engine.step()


def measure_zero(case: Case, results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        answers: Any = context.SimpleQueue()
        processes = [context.Process(target=_rank, args=(rank, case, folder, answers)) for rank in range(case.ranks)]
        for process in processes:
            process.start()
        # The slowest rank is the step's time; work is what the largest partition has.
        found = [answers.get() for _ in processes]
        for process in processes:
            process.join()
    slowest = max(found, key=lambda answer: sum(answer["samples"]["eager"]))
    extras = {key: max(answer["extras"][key] for answer in found) for key in EXTRAS}
    results.add(asdict(case), "torch", slowest["samples"], {"eager": extras})


def _rank(rank: int, case: Case, folder: str, answers: Any) -> None:
    import deepspeed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    model = Pairs(case)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": 1e-4, "damping": DAMPING, "kernels": "torch"}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    optimizer = engine.basic_optimizer
    (partition,) = optimizer.param_groups[0]["params"]
    partition.grad = torch.randn_like(partition)
    cpp = _cpp_engine(case, config)
    copy = nn.Parameter(partition.detach().clone())
    copy.grad = partition.grad.clone()
    peer = torch_optimizer("AdamW", [copy])
    optimizer.step()
    sent = _sent(optimizer)
    elements = partition.numel()
    matrices = 2 * case.modules * case.experts // dist.get_world_size()  # those of its own rows
    steps = {"torch": peer.step, "eager": optimizer.step, **({"cpp": cpp.step} if cpp else {})}
    samples = {name: list(times) for name, times in _in_step(steps)}
    extras = {**work(case, elements, matrices), "sent_bytes": sent}
    answers.put({"samples": samples, "extras": extras})
    dist.barrier()
    dist.destroy_process_group()


def _cpp_engine(case: Case, config: dict[str, Any]) -> torch.optim.Optimizer | None:
    """The optimizer of an engine with C++ kernels, its partition with gradients; None where there are none."""
    import deepspeed

    if case.rank not in RANKS:
        return None
    model, options = Pairs(case), config["optimizer"]["params"]
    config = {**config, "optimizer": {**config["optimizer"], "params": {**options, "kernels": "cpp"}}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    (partition,) = engine.basic_optimizer.param_groups[0]["params"]
    partition.grad = torch.randn_like(partition)
    return engine.basic_optimizer


def _sent(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that one step gives to collectives."""
    sent, reduce, exchange = 0, dist.all_reduce, dist.all_to_all_single

    def reduced(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    def exchanged(received: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += given.nbytes
        return exchange(received, given, *args, **kwargs)

    with mock.patch.multiple(dist, all_reduce=reduced, all_to_all_single=exchanged):
        optimizer.step()
    return sent


def _in_step(steps: dict[str, Any], rounds: int = 7) -> Iterator[tuple[str, list[float]]]:
    """CPU seconds of each step, equally often on every rank: the all-reduce inside needs them all."""
    for name, step in steps.items():
        times = []
        for _ in range(rounds + 1):
            dist.barrier()
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        yield name, times[1:]


def main() -> None:
    parser = arguments(__doc__, "optimizer")
    parser.add_argument("--part", choices=PARTS, help="one part alone")
    args = parser.parse_args()
    set_heap(args.heap)
    torch.set_num_threads(1)
    results = Results(args.output, tuple(Case.__dataclass_fields__), EXTRAS, fresh=args.fresh)
    started = time.monotonic()
    for case in SHORT if args.short else FULL:
        if args.part not in (None, case.part) or results.has(asdict(case)):
            continue
        if time.monotonic() - started > args.seconds:
            break
        measures = (measure_whole, measure_zero, measure_threads, measure_offload)
        dict(zip(PARTS, measures, strict=True))[case.part](case, results)


if __name__ == "__main__":
    main()
