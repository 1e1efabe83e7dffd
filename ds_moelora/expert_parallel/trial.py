"""What "auto" takes: every way that is open is tried on the first training batch, and the fastest stays.

Two numbers cannot be known beforehand: what a byte costs on this network, and how a product's time grows with its
columns on this processor. The first training batch of a layer is therefore mixed (forward and backward, results thrown
away) by each way in turn, on all ranks together, before its real turn. Layers of equal sizes share one trial. Times are
maxima over all ranks, so that all ranks decide alike; after the trial nothing is measured any more.

So that a run repeats to the bit wherever it makes no difference, the way that is best by rule (fewer bytes moved,
`mixture.choice.choose_compute`) is kept unless another was more than `MARGIN` faster.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..mixture.choice import BY_NAME, choose_compute
from ..mixture.compute import ExpertCompute
from ..pairs import GateSettings
from .exchange import bytes_moved, exchanged_moe_lora
from .gather import Bucket, gathered_moe_lora
from .spec import ShardSpec

MARGIN = 0.05
REPETITIONS = 40
SECONDS = 2.0  # per layer size; after the second repetition none is begun that would not fit

logger = logging.getLogger("ds_moelora")
_decided: dict[tuple[Any, ...], Way] = {}


class Way(NamedTuple):
    """How tokens and experts meet ("weights", "tokens"), and how the products are done (but "auto")."""

    dispatch: str
    compute: str

    @property
    def products(self) -> ExpertCompute:
        return BY_NAME[self.compute]

    def __str__(self) -> str:
        return f"{self.dispatch}, {self.compute}"


class Batch(NamedTuple):
    """What a layer is given, as in `mixture.moe_lora.moe_lora`."""

    base_out: Tensor
    x: Tensor
    gates: Tensor
    chosen: Tensor
    scaling: float
    settings: GateSettings | None


def way_by_rule(spec: ShardSpec, dispatch: str) -> Way:
    """`expert_compute` as it is set, or for "auto" by size, for the experts that one product covers."""
    here = spec.num_experts if dispatch == "weights" else spec.num_experts // spec.ep_size
    # A received row has chosen k / ranks of the experts here, and at least one.
    top_k = spec.top_k if dispatch == "weights" else max(1, spec.top_k // spec.ep_size)
    return Way(dispatch, choose_compute(spec.compute, here, top_k, spec.rank).name)


def open_ways(spec: ShardSpec) -> list[Way]:
    """The ways that `ep_dispatch` and `expert_compute` leave open; grouped products only where they cost no wait."""
    dispatches = ("weights", "tokens") if spec.dispatch == "auto" else (spec.dispatch,)
    both = spec.compute == "auto" and not torch.accelerator.is_available()
    return [
        Way(dispatch, compute)
        for dispatch in dispatches
        for compute in (("dense", "grouped") if both else (way_by_rule(spec, dispatch).compute,))
    ]


def choose_way(spec: ShardSpec, layer: Any, batch: Batch) -> Way:
    """The way for a layer, tried on a batch. Every rank of the world must call it for the same layer at the same time.

    Args:
        layer: its `gathering.ShardedLayer`. batch: this rank's.
    """
    ways = open_ways(spec)
    if len(ways) == 1:
        return ways[0]
    tokens = batch.x.new_tensor([len(batch.x)], dtype=torch.float32)
    dist.all_reduce(tokens)
    per_rank, dtype = tokens.item() / dist.get_world_size(), batch.base_out.dtype
    sizes = (spec.num_experts, spec.ep_size, spec.top_k, spec.in_features, spec.out_features, spec.rank)
    key = (*sizes, per_rank, dtype, *ways)
    if key not in _decided:
        moved = bytes_moved(*sizes, per_rank, torch.finfo(dtype).bits // 8)
        seconds = {way: statistics.median(found) for way, found in time_ways(ways, layer, batch).items()}
        usual = way_by_rule(spec, min({way.dispatch for way in ways}, key=lambda dispatch: moved[dispatch]))
        _decided[key] = fastest(seconds, usual)
        if dist.get_rank() == 0:
            # A warning, since nothing below it is shown unless somebody has set up logging.
            logger.warning(_message(spec, _decided[key], per_rank, seconds, moved))
    return _decided[key]


def fastest(seconds: dict[Way, float], usual: Way) -> Way:
    """The way with the least time; `usual` if it is within `MARGIN` of it."""
    best = min(seconds, key=lambda way: seconds[way])
    return usual if seconds[usual] <= (1 + MARGIN) * seconds[best] else best


def time_ways(ways: list[Way], layer: Any, batch: Batch) -> dict[Way, list[float]]:
    """Seconds of forward and backward by each way, interleaved; the slowest rank's, hence equal on all ranks."""
    found: dict[Way, list[float]] = {way: [] for way in ways}
    total = 0.0
    for repetition in range(1 + REPETITIONS):
        first = repetition % len(ways)  # each in turn: what ran before leaves its traces in the caches
        order = ways[first:] + ways[:first]
        times = torch.tensor([_time_once(way, layer, batch) for way in order], device=batch.x.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        last = times.tolist()
        total += sum(last)
        if repetition == 1:
            found = {way: [] for way in ways}  # the first was to warm up
        for way, value in zip(order, last, strict=True):
            found[way].append(value)
        if total + sum(last) > SECONDS:
            break
    return found


def _time_once(way: Way, layer: Any, batch: Batch) -> float:
    dist.barrier(layer.group)
    _synchronize(batch.x)
    start = time.perf_counter()
    try_way(way, layer, batch)
    _synchronize(batch.x)
    return time.perf_counter() - start


def _synchronize(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize()


def try_way(way: Way, layer: Any, batch: Batch) -> None:
    """Forward and backward of a mixture by one way, without any effect.

    The base layer's product, which can hide a gather, is there as one with zeros.
    """
    base_out, x, gates, chosen, scaling, settings = batch
    # Hooks of a gradient checkpoint around the layer must not see any of this: the innermost hooks are used alone.
    with saved_tensors_hooks(lambda t: t, lambda t: t), torch.enable_grad():
        base_out, x, gates = (t.detach().requires_grad_() for t in (base_out, x, gates))
        shard = _Detached(layer)
        entered = Bucket([shard]).enter(0, base_out.dtype) if way.dispatch == "weights" else None
        x.detach() @ x.new_zeros(x.shape[1], base_out.shape[1])
        if entered is not None:
            y = gathered_moe_lora(base_out, x, gates, chosen, entered, scaling, settings, False, way.products)
        else:
            factors = (shard.lora_A, shard.lora_B)
            y = exchanged_moe_lora(base_out, x, gates, chosen, *factors, scaling, settings, way.products, shard.group)
        torch.autograd.grad(y, [base_out, x, gates, shard.lora_A, shard.lora_B], y.detach())


class _Detached:
    """A layer's experts, sharing its memory, whose gradients go nowhere."""

    def __init__(self, layer: Any) -> None:
        self.group = layer.group
        self.lora_A, self.lora_B = (p.detach().requires_grad_() for p in (layer.lora_A, layer.lora_B))


def _message(spec: ShardSpec, way: Way, tokens: float, seconds: dict[Way, float], moved: dict[str, float]) -> str:
    times = "; ".join(f"{each} {1e3 * value:.3g} ms" for each, value in seconds.items())
    sent = ", ".join(f"{dispatch} {moved[dispatch] / 1e6:.3g} MB" for dispatch in sorted({w.dispatch for w in seconds}))
    return (
        f"'auto' took {str(way)!r} (ep_dispatch, expert_compute) for {spec.layer_name} and layers of its sizes "
        f"({spec.in_features} -> {spec.out_features}, {spec.num_experts} experts on {spec.ep_size} ranks, "
        f"{tokens:.0f} tokens per rank). Tried: {times}. A rank sends: {sent}. To fix the choice, set both fields."
    )
