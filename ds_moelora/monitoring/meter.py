"""Measures training steps: everything is summed on the device, and over the ranks in one all-reduce per report.

A reported step is armed before its first forward pass and read after the optimizer's step. Which steps
these are must follow from their number alone, so that all ranks agree; nothing else decides whether ranks communicate.
docs/tensorboard.md has the formulas.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optimizer.base import GateRiemannian
from ..optimizer.step_statistics import StepStatistics
from ..tuner import MoELoRAExperts, MoELoRAModel
from ..tuner.losses import batch_layout
from .descriptions import TAGS
from .formulas import load_over_ideal, mean_similarity, projection, router_sums, sketch_products
from .run_info import basic_optimizer

_SUMS = ("raw", "preconditioned", "weight", "update", "tokens")
_MAXIMA = ("condition", "seconds", "peak")


@dataclass(frozen=True)
class Report:
    """One reported step; the same on every rank.

    Args:
        scalars: tag of `TAGS` -> value; without those that nothing was seen of.
        loads: (L, E) `monitoring.formulas.load_over_ideal`; L = 0 without a mixture.
        layers: names of the L layers. number: of reports before it.
    """

    scalars: dict[str, float]
    loads: Tensor
    layers: list[str]
    number: int


class RouterMeter:
    """A `RouterListener` of every MoE-LoRA adapter in a model; sums over the forward passes since `arm`.

    Layers are the trained `MoELoRAExperts` in the model's order, which is the same on every rank.

    Args:
        model: with or without MoE-LoRA layers.

    Attributes:
        names: of the layers. num_experts: E of each. ep_size: ranks that share the experts.
        packed: (L, 4 + E), `monitoring.formulas.router_sums`, E padded to the largest.
        sketches: (L, E, P * P), `monitoring.formulas.sketch_products`; zero where the experts are other ranks'.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tuners = [m for m in model.modules() if isinstance(m, MoELoRAModel)]
        experts = [m for m in model.modules() if isinstance(m, MoELoRAExperts) and m.router.weight.requires_grad]
        self.experts = experts
        self.names = [e.pair.name for e in experts]
        self.num_experts = [e.num_experts for e in experts]
        self.ep_size = max((e.num_experts // len(e.factors()[1]) for e in experts if e.is_sharded), default=1)
        self._projections: dict[tuple[int, torch.device], Tensor] = {}
        self._position: dict[Any, int] = {}

    def arm(self, device: torch.device) -> None:
        """From zero; the next training forwards are looked at."""
        L, E = len(self.experts), max(self.num_experts, default=0)
        self.packed = torch.zeros(L, 4 + E, device=device)
        self.sketches = torch.zeros(L, E, projection(1).shape[1] ** 2, device=device)
        self._sketched: set[int] = set()
        self._position = {id(e): i for i, e in enumerate(self.experts)}
        for tuner in self.tuners:
            tuner.router_listener = self

    def disarm(self) -> None:
        """Nothing is looked at any more."""
        for tuner in self.tuners:
            tuner.router_listener = None

    def saw_experts(self, experts: Any) -> None:
        layer = self._position.get(id(experts))
        if layer is None or layer in self._sketched:
            return
        self._sketched.add(layer)
        lora_A, lora_B = experts.factors()
        first = experts.experts_shard().first_expert if experts.is_sharded else 0
        sketches = sketch_products(lora_A, lora_B, *(self._projection(f) for f in (lora_A, lora_B)))
        self.sketches[layer, first : first + len(sketches)] = sketches

    def saw_router(self, experts: Any, logits: Tensor, chosen: Tensor, mask: Tensor | None) -> None:
        layer = self._position.get(id(experts))
        if layer is None:
            return
        sums = router_sums(logits, chosen, mask)
        self.packed[layer, : len(sums)] += sums

    def _projection(self, factor: Tensor) -> Tensor:
        key = (factor.shape[1], factor.device)
        if key not in self._projections:
            self._projections[key] = projection(*key)
        return self._projections[key]


class TrainingMeter:
    """Measures the steps of one training run.

    Args:
        model: what is trained, with PEFT's wrapper. optimizer: what trains it, or a DeepSpeed engine.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.routers = RouterMeter(model)
        found = basic_optimizer(optimizer)
        self.optimizer = found if isinstance(found, GateRiemannian) else None
        self.device = next(p.device for p in model.parameters())
        self.is_armed, self._reports = False, 0
        self._tokens: Tensor | int = 0
        self._seconds, self._steps, self._mark = 0.0, 0, time.perf_counter()
        self._hook = model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def close(self) -> None:
        """Leaves model and optimizer as they were."""
        self._disarm()
        self._hook.remove()

    def arm(self) -> None:
        """The step that begins will be reported. Every rank."""
        self.routers.arm(self.device)
        if self.optimizer is not None:
            self.optimizer.statistics = StepStatistics()
        self.is_armed = True

    def restart_clock(self) -> None:
        """What has passed since the last step is not training."""
        self._mark = time.perf_counter()

    def step_done(self) -> Report | None:
        """After every optimizer step: its report if it was armed. Every rank; one all-reduce in that case."""
        now = time.perf_counter()
        self._seconds, self._steps, self._mark = self._seconds + now - self._mark, self._steps + 1, now
        if not self.is_armed:
            return None
        statistics = self.optimizer.statistics if self.optimizer is not None else None
        self._disarm()
        report = self._report(statistics or StepStatistics())
        self._tokens, self._seconds, self._steps, self._reports = 0, 0.0, 0, self._reports + 1
        return report

    def _disarm(self) -> None:
        self.routers.disarm()
        if self.optimizer is not None:
            self.optimizer.statistics = None
        self.is_armed = False

    def _count_tokens(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training:
            layout = batch_layout(kwargs, labels_are_shifted=False)
            if layout.mask is not None:
                self._tokens = self._tokens + layout.mask.ne(0).sum()
            elif layout.grid is not None:
                self._tokens = self._tokens + layout.grid[0] * layout.grid[1]

    # The report

    @torch.no_grad()
    def _report(self, statistics: StepStatistics) -> Report:
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        rank = dist.get_rank() if world > 1 else 0
        squares = [statistics.raw, statistics.preconditioned, statistics.weight, statistics.update]
        sums = self._vector([*squares, self._tokens])
        maxima = torch.zeros(world, len(_MAXIMA), device=self.device)  # each rank fills its row: a sum is all there is
        maxima[rank] = self._vector([statistics.condition, self._seconds, _peak_bytes(self.device)])
        parts = [sums, maxima, self.routers.packed]
        if self.routers.ep_size > 1:  # otherwise every rank has sketched all experts
            parts.append(self.routers.sketches * (self.routers.ep_size / world))
        buffer = torch.cat([part.flatten() for part in parts])
        if world > 1:
            dist.all_reduce(buffer)
        if self.routers.ep_size == 1:
            buffer = torch.cat([buffer, self.routers.sketches.flatten()])
        on_host = buffer.double().cpu()  # the one time that the host waits for the device
        found = on_host.split([len(sums), maxima.numel(), self.routers.packed.numel(), self.routers.sketches.numel()])
        totals = dict(zip(_SUMS, found[0].tolist(), strict=True))
        largest = dict(zip(_MAXIMA, found[1].view_as(maxima).amax(0).tolist(), strict=True))
        packed, sketches = found[2].view(self.routers.packed.shape), found[3].view(self.routers.sketches.shape)
        loads = load_over_ideal(packed[:, 4:], torch.tensor(self.routers.num_experts))
        scalars = {**_of_routers(packed, loads, sketches), **_of_optimizer(totals, largest)}
        scalars |= self._of_machine(totals, largest)
        scalars = {tag: scalars[tag] for tag in TAGS if tag in scalars}
        return Report(scalars, loads, self.routers.names, self._reports)

    def _vector(self, values: list[Tensor | float | None]) -> Tensor:
        numbers = [0.0 if value is None else value for value in values]
        return torch.stack([torch.as_tensor(n, dtype=torch.float32, device=self.device) for n in numbers])

    def _of_machine(self, totals: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
        found = {
            "perf/step_seconds": largest["seconds"] / max(self._steps, 1),
            "memory/peak_bytes": largest["peak"],
        }
        if totals["tokens"]:
            found["perf/tokens_per_second"] = totals["tokens"] / largest["seconds"]
        return found


def _of_routers(packed: Tensor, loads: Tensor, sketches: Tensor) -> dict[str, float]:
    """From sums over all ranks; nothing where no layer saw a token."""
    seen = packed[:, 2] > 0
    if not seen.any():
        return {}
    entropy, balance, tokens, sequences = packed[seen, :4].T
    there = ~loads.isnan()
    found = {
        "moe/load_max_over_ideal": loads[seen].nan_to_num(0).amax(1).mean(),
        "moe/router_entropy": (entropy / tokens).mean(),
        "moe/dead_expert_fraction": (loads[there] == 0).double().mean(),
        "moe/aux_loss": (balance / sequences).mean(),
    }
    similarity = mean_similarity(sketches)
    if not similarity.isnan():
        found["moe/expert_similarity"] = similarity
    return {tag: value.item() for tag, value in found.items()}


def _of_optimizer(totals: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
    """Nothing where no step was taken: a loss scale overflowed, or the optimizer is another one."""
    found = {}
    if largest["condition"] != 0:
        found["riemannian/gram_condition_max"] = largest["condition"]
    for tag, above, below in (
        ("riemannian/update_to_weight", "update", "weight"),
        ("riemannian/preconditioned_over_raw", "preconditioned", "raw"),
    ):
        if totals[below] != 0:
            found[tag] = (totals[above] / totals[below]) ** 0.5
    return found


def _peak_bytes(device: torch.device) -> float:
    """The most memory that torch had allocated on a GPU so far; on a CPU the largest resident set of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
