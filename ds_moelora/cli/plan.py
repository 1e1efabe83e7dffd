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
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers

from ..planner.hardware import EFFICIENCY, GPUS, LINKS, UTILISATION, hardware, load_calibration
from ..planner.model import describe_model
from ..planner.planner import DoesNotFitError, make_plan
from ..planner.workload import COMPUTES, DTYPE_BYTES, OPTIMIZER_STATES, Workload
from ..redaction import redact_words
from . import plan_report

SUMMARY = "memory, bytes and time per step on N GPUs; which ZeRO stage, ep_size and dispatch to choose"
FORMATS = ("table", "markdown", "json")
MACHINE = ("gpu", "intra", "inter", "latency", "efficiency", "utilisation", "peak", "memory", "usable")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`; they end up as the fields of `Workload` and the arguments of `hardware`."""
    _add_workload(parser)
    _add_machine(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=FORMATS, default="table")
    output.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    output.add_argument("--write", metavar="FILE", help="also write it as a recipe for the launcher's --config")
    output.add_argument("--all", action="store_true", help="list every way, not only the ten fastest that fit")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    """What is trained, and how."""
    add = parser.add_argument_group("model and adapter").add_argument
    add("--model-config", required=True, metavar="PATH", help="config.json of the model, its folder, or a hub id")
    add("--target-modules", nargs="+", default=["all-linear"], metavar="NAME",
        help="names, one regular expression, or all-linear (default)")  # fmt: skip
    add("--num-experts", nargs="+", type=int, required=True, metavar="E")
    add("--r", nargs="+", type=int, default=[4], help="rank of one expert (default 4)")
    add("--top-k", type=int, default=Workload.top_k, metavar="K", help="experts per token (default %(default)s)")
    add("--expert-compute", choices=COMPUTES, default=Workload.expert_compute,
        help="default dense (or fused: what auto takes on GPUs)")  # fmt: skip
    add = parser.add_argument_group("step").add_argument
    add("--micro-batch", type=int, default=Workload.micro_batch, metavar="B",
        help="sequences per GPU and step (default %(default)s)")  # fmt: skip
    add("--sequence-length", type=int, default=Workload.sequence_length, metavar="S",
        help="tokens (default %(default)s)")  # fmt: skip
    add("--dtype", choices=DTYPE_BYTES, default=Workload.dtype)
    add("--base-bytes", type=float, metavar="BYTES", help="per weight of the base; 0.5 for 4 bits")
    add("--optimizer", choices=OPTIMIZER_STATES, default=Workload.optimizer)
    add("--plain-optimizer", action="store_false", dest="riemannian", help="without the Riemannian preconditioner")
    add("--no-checkpointing", action="store_false", dest="checkpointing", help="without gradient checkpointing")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """On what it is trained."""
    add = parser.add_argument_group("machine").add_argument
    giga, tera, micro = (_times(factor) for factor in (1e9, 1e12, 1e-6))
    add("--gpus", nargs="+", type=int, required=True, metavar="N")
    add("--gpus-per-node", type=int, default=Workload.gpus_per_node, metavar="N",
        help="that --intra joins (default %(default)s)")  # fmt: skip
    add("--gpu", choices=GPUS, default="h100")
    add("--gpu-memory", type=giga, dest="memory", metavar="GB", help="per GPU; default: the GPU's")
    add("--usable", type=float, default=0.9, metavar="SHARE", help="of it, to fill at most (default 0.9)")
    add("--peak-tflops", type=tera, dest="peak", metavar="TFLOPS", help="default: the GPU's dense bf16 peak")
    add("--utilisation", type=float, default=UTILISATION, metavar="SHARE", help="of the peak (default %(default)s)")
    add("--intra", choices=LINKS, default="nvlink4", help="links within a node (default nvlink4)")
    add("--inter", choices=LINKS, default="infiniband-400", help="and between (default infiniband-400)")
    add("--efficiency", type=float, default=EFFICIENCY, metavar="SHARE",
        help="of a preset link's bandwidth (default %(default)s)")  # fmt: skip
    add("--intra-bandwidth", type=giga, dest="intra", metavar="GB/S", help="that a GPU reaches, instead of --intra")
    add("--inter-bandwidth", type=giga, dest="inter", metavar="GB/S", help="that a GPU reaches, instead of --inter")
    add("--latency", type=micro, metavar="US", help="of a link, microseconds; default: the presets'")
    add("--calibration", metavar="FILE",
        help="collectives and FLOP/s that benchmarks/bench_expert_parallel.py measured")  # fmt: skip


def _times(factor: float) -> Callable[[str], float]:
    """A kind of flag whose number has another unit than the program's."""

    def number(text: str) -> float:
        return factor * float(text)

    return number


def run(args: argparse.Namespace) -> int:
    """Plans every combination and prints it.

    Raises:
        ValueError: wrong values, or (unless there are several combinations) nothing fits.
    """
    transformers.logging.set_verbosity_error()
    machine = hardware(**{name: getattr(args, name) for name in MACHINE})
    if args.calibration is not None:
        machine = load_calibration(args.calibration, machine)
    works = []
    for num_experts, rank, gpus in itertools.product(args.num_experts, args.r, args.gpus):
        step = {field.name: getattr(args, field.name) for field in fields(Workload) if field.name != "rank"}
        works.append(Workload(**{**step, "num_experts": num_experts, "rank": rank, "gpus": gpus}))
    model = describe_model(args.model_config, _targets(args.target_modules))
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


def _targets(words: list[str]) -> str | list[str]:
    """A single word is a name; anything else alone is a regular expression."""
    (first, *more) = words
    return first if not more and (first == "all-linear" or not re.fullmatch(r"[\w.]+", first)) else words
