"""One training run: what it is made of (`Run`), the papers' methods, and the loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import ds_moelora
from ds_moelora.optimizer import preconditioner

HEAD_LR = 1e-3
FINAL_LR = 0.1  # of the first: the papers' linear decay to a tenth
CURVE_POINTS = 16
DIVERGED = math.inf


@dataclass(frozen=True)
class Method:
    """An optimizer, and the gate scaling that it sets; None: torch's own, with exact gradients."""

    optimizer: type[torch.optim.Optimizer]
    gate_scaling: str | None = None


METHODS = {
    "SGD": Method(torch.optim.SGD),
    "RSGD": Method(ds_moelora.GateRiemannianSGD, "none"),
    "gRSGD (sqrt)": Method(ds_moelora.GateRiemannianSGD, "sqrt"),
    "gRSGD (full)": Method(ds_moelora.GateRiemannianSGD, "full"),
    "AdamW": Method(torch.optim.AdamW),
    "RAdamW": Method(ds_moelora.GateRiemannianAdamW, "none"),
    "gRAdamW (sqrt)": Method(ds_moelora.GateRiemannianAdamW, "sqrt"),
    "gRAdamW (full)": Method(ds_moelora.GateRiemannianAdamW, "full"),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run's outcome depends on, but for the machine.

    Args:
        task, method: names. seed: of the adapter's start and of the order of the examples.
        lr: the first step's; it falls linearly to a tenth of that.
        start: "kaiming" (random A, zero B) or "goat" (with GOAT's scaling).
        num_experts, top_k, r: E, k, r.
        damping: d. relative_damping: c, for d = max(damping, c * trace(G)); 0: the package's floor, eps_fp32.
        gate_lr_scale: the routers' learning rate by the others'.
        steps, batch, examples, layers: the size of the run; the last two are the task's.
    """

    task: str
    method: str
    seed: int
    lr: float
    start: str = "kaiming"
    num_experts: int = 8
    top_k: int = 2
    r: int = 4
    damping: float = 1e-6
    relative_damping: float = 0.0
    gate_lr_scale: float = 1e-3
    steps: int
    batch: int
    examples: int
    layers: int


class Task(Protocol):
    """A data set and a frozen model."""

    targets: tuple[str, ...]
    train_size: int

    def build(self) -> tuple[nn.Module, nn.Module | None]:
        """A fresh frozen model to adapt, and a head (or None) that is trained beside the adapter."""

    def loss(self, model: nn.Module, head: nn.Module | None, index: Tensor) -> Tensor:
        """The training loss of some examples."""

    def evaluate(self, model: nn.Module, head: nn.Module | None) -> dict[str, float]:
        """`test_loss`, `test_accuracy` and, where it has a meaning, `mutual_information`."""


def adapt(run: Run, task: Task) -> tuple[nn.Module, nn.Module | None]:
    """The task's model with a fresh adapter, and its head."""
    torch.manual_seed(run.seed)
    model, head = task.build()
    goat = run.start == "goat"
    config = ds_moelora.MoELoRAConfig(
        num_experts=run.num_experts,
        top_k=run.top_k,
        r=run.r,
        target_modules=list(task.targets),
        init_lora_weights="goat" if goat else True,
        scaling="goat" if goat else "alpha",
        router_aux_loss_coef=0.0,
    )
    return get_peft_model(model, config), head  # type: ignore[arg-type]


def build_optimizer(run: Run, model: nn.Module, method: Method | None = None) -> torch.optim.Optimizer:
    """The method's optimizer. The routers' learning rate is `gate_lr_scale` times the experts', whatever the method."""
    method = method or METHODS[run.method]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if method.gate_scaling is not None:
        options: dict[str, Any] = {"damping": run.damping, "gate_scaling": method.gate_scaling}
        return method.optimizer(trained.values(), lr=run.lr, gate_lr_scale=run.gate_lr_scale, **options)  # type: ignore[call-arg]
    routers = [p for name, p in trained.items() if ".router." in name]
    experts = [p for name, p in trained.items() if ".router." not in name]
    groups = [{"params": experts}, {"params": routers, "lr": run.lr * run.gate_lr_scale}]
    plain: dict[str, Any] = {"weight_decay": 0.0}  # torch's AdamW has 0.01
    return method.optimizer(groups, lr=run.lr, **plain)


@contextlib.contextmanager
def trace_damping(relative: float) -> Iterator[None]:
    """d = max(damping, relative * trace(G)): the package's floor of eps_fp32 * trace, raised for an ablation."""
    before = preconditioner.RELATIVE_DAMPING
    preconditioner.RELATIVE_DAMPING = relative or before
    try:
        yield
    finally:
        preconditioner.RELATIVE_DAMPING = before


def batches(run: Any, size: int) -> Iterator[Tensor]:
    """`run.steps` batches: every epoch a new order, from the seed alone, so that all methods see the same ones."""
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(run.steps):
        while len(order) < run.batch:
            order = torch.cat([order, torch.randperm(size, generator=generator)])
        yield order[: run.batch]
        order = order[run.batch :]


def train(run: Run, task: Task) -> dict[str, Any]:
    """Trains once; `fit`'s outcome."""
    model, head = adapt(run, task)
    optimizers = [build_optimizer(run, model)]
    if head is not None:  # trained alike in every run, so that methods differ in the adapters alone
        optimizers.append(torch.optim.AdamW(head.parameters(), lr=HEAD_LR, weight_decay=0.0))
    with trace_damping(run.relative_damping):
        return fit(run, task, model, head, optimizers)


def fit(
    run: Any,
    task: Task,
    model: nn.Module,
    head: nn.Module | None,
    optimizers: list[torch.optim.Optimizer],
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Any]:
    """The loop of a run: every learning rate falls linearly to a tenth.

    Args:
        run: has `steps`, `batch` and `seed`. clock: of `seconds`, CPU time of this process.

    Returns:
        `train_loss`: mean over the batches of the last quarter of the steps; `curve`: means over `CURVE_POINTS`
        equal parts of the run; the task's evaluation; `seconds` of the steps. Losses of a run that meets a loss which
        is not finite are infinite, and it stops there.
    """
    schedules = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_LR, total_iters=max(run.steps - 1, 1))
        for optimizer in optimizers
    ]
    losses: list[float] = []
    start = clock()
    for index in batches(run, task.train_size):
        loss = task.loss(model, head, index)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = clock() - start
    if len(losses) < run.steps or not math.isfinite(losses[-1]):
        return {"train_loss": DIVERGED, "test_loss": DIVERGED, "seconds": round(seconds, 2)}
    return {
        "train_loss": statistics.fmean(losses[3 * run.steps // 4 :]),
        "curve": " ".join(f"{statistics.fmean(part):.5g}" for part in parts(losses)),
        "seconds": round(seconds, 2),
        **evaluate(task, model, head),
    }


def parts(losses: list[float]) -> list[list[float]]:
    """The losses of a run in `CURVE_POINTS` parts (fewer, if there are fewer steps) of nearly equal length."""
    count = min(CURVE_POINTS, len(losses))
    cuts = [round(i * len(losses) / count) for i in range(count + 1)]
    return [losses[a:b] for a, b in itertools.pairwise(cuts)]


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, head: nn.Module | None) -> dict[str, float]:
    """The task's evaluation, in evaluation mode; losses that are not finite count as infinite."""
    model.eval()
    result = task.evaluate(model, head)
    if not math.isfinite(result.get("test_loss", 0.0)):
        result["test_loss"] = DIVERGED
    return result


def choice_evaluation(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Cross-entropy and accuracy of (n, classes) scores."""
    accuracy = (scores.argmax(-1) == labels).double().mean().item()
    return {"test_loss": F.cross_entropy(scores, labels).item(), "test_accuracy": accuracy}
