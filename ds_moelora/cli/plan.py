"""Memory, traffic and time of a fine-tuning step on GPUs that need not be here, and how to spread it over them.

  python -m ds_moelora plan --model-config benchmarks/model_configs/llama3_70b.json --num-experts 64 --r 16 --gpus 64

computes every ZeRO stage, every ep_size and both dispatches, and names the one to choose. Several values of
--num-experts, --r and --gpus give a table with one line for each combination. The model behind it, its assumptions and
its limits are in docs/scaling.md; no weights are loaded, and neither DeepSpeed nor a GPU is needed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import transformers

from ..planner import (
    GPUS,
    LINKS,
    DoesNotFitError,
    Hardware,
    Workload,
    describe_model,
    hardware,
    load_calibration,
    make_plan,
)
from ..planner.workload import COMPUTES, DTYPE_BYTES, OPTIMIZER_STATES
from ..redaction import redact_words
from . import plan_report

SUMMARY = "memory, bytes and time per step on N GPUs; which ZeRO stage, ep_size and dispatch to choose"
FORMATS = ("table", "markdown", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    add_model_arguments(parser.add_argument_group("model and adapter"))
    add_step_arguments(parser.add_argument_group("step"))
    add_machine_arguments(parser.add_argument_group("machine"))
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=FORMATS, default="table")
    output.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    output.add_argument("--write", metavar="FILE", help="also write it as a recipe for the launcher's --config")
    output.add_argument("--all", action="store_true", help="list every way, not only the ten fastest that fit")


def add_model_arguments(group: Any) -> None:
    """What is trained."""
    group.add_argument(
        "--model-config", required=True, metavar="PATH", help="config.json of the model, its folder, or a hub id"
    )
    group.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="names, one regular expression, or all-linear (default)",
    )
    group.add_argument("--num-experts", nargs="+", type=int, required=True, metavar="E")
    group.add_argument("--r", nargs="+", type=int, default=[4], help="rank of one expert (default 4)")
    group.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default 2)")
    group.add_argument(
        "--expert-compute",
        choices=COMPUTES,
        default="dense",
        help="default dense (or fused: what auto takes on GPUs)",
    )


def add_step_arguments(group: Any) -> None:
    """How it is trained."""
    group.add_argument("--micro-batch", type=int, default=1, metavar="B", help="sequences per GPU and step (default 1)")
    group.add_argument("--sequence-length", type=int, default=4096, metavar="S", help="tokens (default 4096)")
    group.add_argument("--dtype", choices=DTYPE_BYTES, default="bf16")
    group.add_argument(
        "--base-bytes",
        type=float,
        metavar="BYTES",
        help="per weight of the base; 0.5 for 4 bits",
    )
    group.add_argument("--optimizer", choices=OPTIMIZER_STATES, default="adamw")
    group.add_argument("--plain-optimizer", action="store_true", help="without the Riemannian preconditioner")
    group.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")


def add_machine_arguments(group: Any) -> None:
    """On what it is trained."""
    group.add_argument("--gpus", nargs="+", type=int, required=True, metavar="N")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="that --intra joins (default 8)")
    group.add_argument("--gpu", choices=GPUS, default="h100")
    group.add_argument("--gpu-memory", type=float, metavar="GB", help="per GPU; default: the GPU's")
    group.add_argument(
        "--usable", type=float, default=0.9, metavar="SHARE", help="of it, to fill at most (default 0.9)"
    )
    group.add_argument("--peak-tflops", type=float, metavar="TFLOPS", help="default: the GPU's dense bf16 peak")
    group.add_argument("--utilisation", type=float, default=0.4, metavar="SHARE", help="of the peak (default 0.4)")
    group.add_argument("--intra", choices=LINKS, default="nvlink4", help="links within a node (default nvlink4)")
    group.add_argument("--inter", choices=LINKS, default="infiniband-400", help="and between (default infiniband-400)")
    group.add_argument(
        "--efficiency", type=float, default=0.8, metavar="SHARE", help="of a preset link's bandwidth (default 0.8)"
    )
    group.add_argument("--intra-bandwidth", type=float, metavar="GB/S", help="that a GPU reaches, instead of --intra")
    group.add_argument("--inter-bandwidth", type=float, metavar="GB/S", help="that a GPU reaches, instead of --inter")
    group.add_argument("--latency", type=float, metavar="US", help="of a link, microseconds; default: the presets'")
    group.add_argument(
        "--calibration", metavar="FILE", help="collectives and FLOP/s that benchmarks/bench_expert_parallel.py measured"
    )


def run(args: argparse.Namespace) -> int:
    """Plans every combination and prints it.

    Raises:
        ValueError: wrong values, or (unless there are several combinations) nothing fits.
    """
    transformers.logging.set_verbosity_error()
    machine = machine_of(args)
    works = [workload_of(args, *sizes) for sizes in itertools.product(args.num_experts, args.r, args.gpus)]
    model = describe_model(args.model_config, targets_of(args))
    if len(works) == 1:
        plan = make_plan(model, works[0], machine)
        print(plan_report.render(plan, args.format, args.all))
        if args.write:
            run = plan_report.write_recipe(plan, Path(args.write), redact_words(["ds-moelora", *args.words]))
            print(f"Written: {args.write}. Fill in MODEL and DATA: {run}", file=sys.stderr)
        return 0
    if args.write:
        raise ValueError(f"--write {args.write} needs one plan; give one value each of --num-experts, --r and --gpus.")
    plans: list[Any] = []
    for work in works:
        try:
            plans.append(make_plan(model, work, machine))
        except DoesNotFitError as error:
            plans.append(error)
    print(plan_report.render_sweep(works, plans, args.format))
    return 0


def targets_of(args: argparse.Namespace) -> str | list[str]:
    """A single word is a name; anything else alone is a regular expression."""
    (first, *more) = args.target_modules
    return first if not more and (first == "all-linear" or not re.fullmatch(r"[\w.]+", first)) else args.target_modules


def workload_of(args: argparse.Namespace, num_experts: int, rank: int, gpus: int) -> Workload:
    """The `Workload` of one combination."""
    return Workload(
        num_experts=num_experts,
        rank=rank,
        top_k=args.top_k,
        gpus=gpus,
        gpus_per_node=args.gpus_per_node,
        micro_batch=args.micro_batch,
        sequence_length=args.sequence_length,
        dtype=args.dtype,
        base_bytes=args.base_bytes,
        optimizer=args.optimizer,
        checkpointing=not args.no_checkpointing,
        expert_compute=args.expert_compute,
        riemannian=not args.plain_optimizer,
    )


def machine_of(args: argparse.Namespace) -> Hardware:
    """The `Hardware` that the flags describe."""

    def scaled(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    machine = hardware(
        args.gpu,
        args.intra if args.intra_bandwidth is None else args.intra_bandwidth * 1e9,
        args.inter if args.inter_bandwidth is None else args.inter_bandwidth * 1e9,
        latency=scaled(args.latency, 1e-6),
        efficiency=args.efficiency,
        utilisation=args.utilisation,
        peak=scaled(args.peak_tflops, 1e12),
        memory=scaled(args.gpu_memory, 1e9),
        usable=args.usable,
    )
    return machine if args.calibration is None else load_calibration(args.calibration, machine)
