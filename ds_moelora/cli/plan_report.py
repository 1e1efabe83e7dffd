"""How a plan is shown: tables, markdown or JSON."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from ..planner.hardware import GB
from ..planner.planner import Candidate, DoesNotFitError, Plan, evaluate
from ..planner.timing import transfer_seconds
from ..planner.workload import Workload
from .tables import table

SHOWN_WAYS = 10
# (optimizer, whether it is preconditioned, stage) -> the file in configs/ (tests/cli/test_cli.py: they are there).
CONFIGS = {
    **{("adamw", True, stage): f"zero{stage}" for stage in range(4)},
    ("adamw", False, 2): "zero2_adamw",
    ("sgd", True, 2): "zero2_papers_sgd",
}


def render(plan: Plan, style: str, every: bool = False) -> str:
    """One plan in full.

    Args:
        style: "table", "markdown" or "json". every: all ways, not only the fastest that fit.
    """
    if style == "json":
        return json.dumps(plan_as_dict(plan), indent=2)
    shown = plan.candidates if every else [c for c in plan.candidates if c.fits][:SHOWN_WAYS]
    if plan.best not in shown:
        shown = [*shown, plan.best]
    parts = [
        _headline(plan),
        _ways_table(plan, shown, style),
        _memory_table(plan, style),
        *([_traffic_table(plan, style)] if plan.best.transfers else []),
        _time_line(plan.best),
        f"Choose {plan.best.choice}.",
        "\n".join(f"- {reason}" for reason in plan.reasons),
        _settings_line(plan),
        _command_line(plan),
    ]
    return "\n\n".join(parts)


def render_sweep(works: Sequence[Workload], plans: Sequence[Plan | DoesNotFitError], style: str) -> str:
    """One line per workload: what to choose, and what it takes there and with one GPU per node."""
    if style == "json":
        entries = [
            {"workload": asdict(work), "error": str(plan)} if isinstance(plan, DoesNotFitError) else plan_as_dict(plan)
            for work, plan in zip(works, plans, strict=True)
        ]
        return json.dumps(entries, indent=2)
    header = ("E", "r", "GPUs", " choose", "memory GB", "sent GB", "step s", "step s, 1 GPU per node")
    rows = []
    for work, plan in zip(works, plans, strict=True):
        sizes = (str(work.num_experts), str(work.rank), f"{work.gpus:,}")
        rows.append((*sizes, *_sweep_cells(plan)))
    machine = next((plan.hardware.name for plan in plans if isinstance(plan, Plan)), "")
    return table(f"Per GPU and step, {machine}", header, rows, style)


def _sweep_cells(plan: Plan | DoesNotFitError) -> tuple[str, ...]:
    if isinstance(plan, DoesNotFitError):
        least = f"does not fit; {plan.least_gpus:,} GPUs do" if plan.least_gpus else "does not fit"
        return (least, "", "", "", "")
    best = plan.best
    alone = evaluate(plan.model, replace(plan.work, gpus_per_node=1), best.choice, plan.hardware)
    times = (best.time.total, alone.time.total)
    return (str(best.choice), f"{best.memory.total / GB:.1f}", f"{best.sent / GB:.2f}", *(f"{t:.2f}" for t in times))


def _headline(plan: Plan) -> str:
    model, work = plan.model, plan.work
    experts = work.num_experts * work.rank * model.adapted_width
    gpus = "1 GPU" if work.gpus == 1 else f"{work.gpus} GPUs"
    checkpointing = "with" if work.checkpointing else "without"
    return (
        f"{model.name}: {model.base_parameters / 1e9:.2f} B parameters, {model.num_adapted} adapted modules, "
        f"E={work.num_experts}, r={work.rank}, k={work.top_k}: {experts / 1e9:.3g} B in experts.\n"
        f"{gpus}, {work.node_size} per node ({plan.hardware.name}); {work.tokens} tokens per GPU and step, "
        f"{work.dtype}, {work.optimizer}, {checkpointing} gradient checkpointing."
    )


def _ways_table(plan: Plan, shown: Sequence[Candidate], style: str) -> str:
    header = ("stage", "ep_size", " dispatch", "memory GB", " fits", "sent GB", "compute s", "overlapped s")
    rows = []
    for way in shown:
        choice, fits = way.choice, "yes" if way.fits else "no"
        names = (str(choice.stage), str(choice.ep_size), choice.dispatch)
        seconds = [f"{s:.3f}" for s in (*way.time, way.time.total)]
        seconds[-1] += "  <-" if way is plan.best else ""
        rows.append((*names, f"{way.memory.total / GB:.1f}", fits, f"{way.sent / GB:.3g}", *seconds))
    fitting = sum(c.fits for c in plan.candidates)
    title = f"Ways to run it: {fitting} of {len(plan.candidates)} fit; shown {len(rows)}"
    return table(title, (*header, "exposed s", "optimizer s", "step s"), rows, style)


def _memory_table(plan: Plan, style: str) -> str:
    memory = plan.best.memory
    rows = [(item.name, item.phase, f"{item.bytes / GB:.3f}") for item in memory.items]
    rows.append(("total", "always + the larger", f"{memory.total / GB:.3f}"))
    return table(f"Memory per GPU, {plan.best.choice}", ("item", " when", "GB"), rows, style)


def _traffic_table(plan: Plan, style: str) -> str:
    rows = []
    for t in plan.best.transfers:
        nodes = "one node" if t.group.per_node == t.group.ranks else f"{t.group.per_node} per node"
        seconds = f"{transfer_seconds(t, plan.hardware):.4f}"
        group, overlapped = f"{t.group.ranks} ({nodes})", "yes" if t.overlapped else "no"
        rows.append((t.name, t.collective, group, f"{t.calls:.0f}", f"{t.sent / GB:.4f}", seconds, overlapped))
    header = ("what", " collective", "ranks", "calls", "GB", "s", " overlapped")
    return table("Sent per GPU and step", header, rows, style)


def _time_line(best: Candidate) -> str:
    time = best.time
    return (
        f"Step: max(compute {time.compute:.3f}, overlapped {time.overlapped:.3f}) + exposed {time.exposed:.3f} + "
        f"optimizer {time.optimizer:.3f} = {time.total:.3f} s; {time.without_overlap:.3f} s if nothing overlapped."
    )


def settings(plan: Plan) -> dict[str, Any]:
    """What to write into the DeepSpeed config and the `MoELoRAConfig`."""
    work, choice = plan.work, plan.best.choice
    adapter: dict[str, Any] = {"num_experts": work.num_experts, "r": work.rank, "top_k": work.top_k}
    adapter["ep_size"] = choice.ep_size
    if choice.dispatch:
        adapter["ep_dispatch"] = choice.dispatch
    return {"zero_stage": choice.stage, "adapter": {**adapter, "expert_compute": work.expert_compute}}


def _settings_line(plan: Plan) -> str:
    chosen = settings(plan)
    fields = ", ".join(f"{key}={value!r}" for key, value in chosen["adapter"].items())
    return f'Settings: "zero_optimization": {{"stage": {chosen["zero_stage"]}}}; MoELoRAConfig({fields})'


def recipe(plan: Plan) -> dict[str, Any] | None:
    """The launcher's flags, MODEL and DATA to be filled in; None: no shipped config has this optimizer and stage."""
    work, choice = plan.work, plan.best.choice
    config = CONFIGS.get((work.optimizer, work.riemannian, choice.stage))
    if config is None:
        return None
    config = "zero2_ep" if config == "zero2" and choice.ep_size > 1 else config
    model, targets = plan.model.name, plan.model.targets
    flags: dict[str, Any] = {
        "deepspeed": f"configs/{config}.json",
        "model_name_or_path": "MODEL" if model.endswith(".json") else model,
        "dataset_name": "DATA",
        "num_experts": work.num_experts,
        "top_k": work.top_k,
        "r": work.rank,
        "lora_alpha": 2 * work.rank,  # the scaling at which the default rates were found
    }
    if targets != "all-linear":
        flags["target_modules"] = [targets] if isinstance(targets, str) else list(targets)
    if choice.ep_size > 1:
        flags |= {"ep_size": choice.ep_size, "ep_dispatch": choice.dispatch}
    flags |= {"per_device_train_batch_size": work.micro_batch, "max_length": work.sequence_length}
    flags |= dict.fromkeys({"bf16", "fp16"} & {work.dtype}, True)
    if work.base_bytes == 0.5:
        flags["load_in_4bit"] = True
    return flags | {"gradient_checkpointing": work.checkpointing}


def starter(plan: Plan) -> str:
    """What starts the launcher on the planned GPUs."""
    nodes = plan.work.gpus // plan.work.node_size
    hosts = f"--num_nodes {nodes} --hostfile HOSTFILE " if nodes > 1 else ""
    return f"deepspeed {hosts}--num_gpus {plan.work.node_size} launch/train.py"


def command(plan: Plan) -> str | None:
    """What starts the launcher so; None without a `recipe`."""
    flags = recipe(plan)
    if flags is None:
        return None
    words = [starter(plan)]
    for name, value in flags.items():
        if isinstance(value, list):
            words.append(f"--{name} {' '.join(map(shlex.quote, value))}")
        elif value is True and name != "gradient_checkpointing":
            words.append(f"--{name}")
        else:
            words.append(f"--{name} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def write_recipe(plan: Plan, path: Path, asked: str) -> str:
    """Writes the flags as a recipe for `--config`, the planner's figures above them.

    Args:
        asked: the command that made the plan.

    Returns:
        The command that runs it.

    Raises:
        ValueError: no shipped config fits, or the file cannot be written.
    """
    flags = recipe(plan)
    if flags is None:
        raise ValueError(f"--write {path}: {_command_line(plan)}")
    best, work, run = plan.best, plan.work, f"{starter(plan)} --config {path}"
    lines = [
        f"{plan.model.base_parameters / 1e9:.1f} B parameters on {work.gpus} GPU(s), {plan.hardware.name}:",
        f"{best.choice}, {best.memory.total / GB:.1f} GB per GPU, {best.time.total:.2f} s per step of {work.tokens} "
        "tokens per GPU, as computed by",
        *(f"  {line}" for line in wrapped(asked)),
        "Run by",
        *(f"  {line}" for line in wrapped(run)),
    ]
    try:
        path.write_text("".join(f"# {line}\n" for line in lines) + yaml.safe_dump(flags, sort_keys=False))
    except OSError as error:
        raise ValueError(f"--write {path}: {error}") from error
    return run


def wrapped(words: str) -> list[str]:
    """A command on several lines of a shell, flags beside their values."""
    lines = [""]
    for part in re.split(r" (?=--)", words):
        if len(lines[-1]) + len(part) > 106:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines).split("\n")


def _command_line(plan: Plan) -> str:
    found = command(plan)
    if found is not None:
        return "\n".join(wrapped(found))
    stage = plan.best.choice.stage
    kind = "" if plan.work.riemannian else "plain "
    return (
        f"No config comes with {kind}{plan.work.optimizer} at stage {stage}: copy configs/zero{stage}.json, and change "
        "its optimizer's type."
    )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain values: bytes and seconds."""
    return {
        "model": plan.model.name,
        "hardware": plan.hardware.name,
        "workload": asdict(plan.work),
        "settings": settings(plan),
        "command": command(plan),
        "reasons": plan.reasons,
        "best": _way_as_dict(plan, plan.best),
        "ways": [_way_as_dict(plan, way) for way in plan.candidates],
    }


def _way_as_dict(plan: Plan, way: Candidate) -> dict[str, Any]:
    transfers = [
        {**t._asdict(), "group": t.group._asdict(), "seconds": transfer_seconds(t, plan.hardware)}
        for t in way.transfers
    ]
    return {
        **asdict(way.choice),
        "fits": way.fits,
        "memory_bytes": way.memory.total,
        "memory": [item._asdict() for item in way.memory.items],
        "sent_bytes": way.sent,
        "transfers": transfers,
        "seconds": {**way.time._asdict(), "total": way.time.total, "without_overlap": way.time.without_overlap},
    }
