"""Bytes that one GPU sends in a step, collective by collective.

A ring over n ranks is counted: all-gather and reduce-scatter of S bytes send (n-1)/n S per rank, all-reduce twice that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..expert_parallel.dispatch import bytes_moved, share_needing
from ..expert_parallel.gather import WINDOW_BYTES
from .grams import GramShare, gram_share
from .hardware import Group
from .model import ModelShape
from .workload import Choice, Workload

# Elements of configs/: allgather_bucket_size, and DeepSpeed's default for stage 0.
GATHER_BUCKET = 2e8
STAGE0_BUCKET = 5e8
ALL_TO_ALLS = 7  # row counts; x, gates and y; dy, dx and dgates


class Transfer(NamedTuple):
    """`sent` bytes per rank in `calls` collectives over `group`; `overlapped`: the GPU computes meanwhile."""

    name: str
    collective: str
    group: Group
    sent: float
    calls: float
    overlapped: bool


def reduce_bucket(model: ModelShape) -> float:
    """Elements of `reduce_bucket_size`: transformers turns "auto" into H^2."""
    return float(model.hidden_size**2)


def world_group(work: Workload) -> Group:
    return Group(work.gpus, work.node_size)


def expert_group(work: Workload, choice: Choice) -> Group:
    """ep_size consecutive ranks. Those of one node, at least: the greatest common divisor."""
    return Group(choice.ep_size, math.gcd(choice.ep_size, work.node_size))


def expert_data_group(work: Workload, choice: Choice) -> Group:
    """The N / ep_size ranks that hold the same experts."""
    ranks = work.gpus // choice.ep_size
    return Group(ranks, min(ranks, work.node_size // expert_group(work, choice).per_node))


def received_rows(work: Workload, choice: Choice) -> float:
    """M: rows that arrive at a GPU per layer under "tokens", its own included, with even routing."""
    return work.tokens * choice.ep_size * share_needing(work.num_experts, choice.ep_size, work.top_k)


def step_traffic(model: ModelShape, work: Workload, choice: Choice) -> list[Transfer]:
    """Everything that a GPU sends in one optimizer step; empty on one GPU."""
    if work.gpus == 1:
        return []
    transfers = _zero3(model, work) if choice.stage == 3 else _reduction(model, work, choice)
    transfers += dispatch_traffic(model, work, choice)
    if work.riemannian and choice.stage > 0:
        transfers += _grams(model, work, choice)
    return [t for t in transfers if t.group.ranks > 1]


def _ring(group: Group, size: float) -> float:
    return (group.ranks - 1) / group.ranks * size


def _reduction(model: ModelShape, work: Workload, choice: Choice) -> list[Transfer]:
    """Stages 0 to 2. DeepSpeed reduces by all-reduce at stages 1 and 2 as well (use_multi_rank_bucket_allreduce)."""
    experts = work.num_experts * work.rank * model.adapted_width / choice.ep_size
    parts = {
        "experts": (experts, expert_data_group(work, choice)),
        "routers": (float(work.num_experts * model.adapted_in), world_group(work)),
    }
    bucket = STAGE0_BUCKET if choice.stage == 0 else reduce_bucket(model)
    transfers = []
    for name, (numel, group) in parts.items():
        sent, calls = _ring(group, numel * work.size), math.ceil(numel / bucket)
        transfers.append(Transfer(f"gradients, {name}", "all_reduce", group, 2 * sent, calls, choice.stage == 2))
        if choice.stage > 0:
            calls = math.ceil(numel / GATHER_BUCKET)
            transfers.append(Transfer(f"new weights, {name}", "all_gather", group, sent, calls, False))
    return transfers


def _zero3(model: ModelShape, work: Workload) -> list[Transfer]:
    """Every weight is gathered for the forward and again for the backward pass (recomputation reuses the latter)."""
    group, trained = world_group(work), work.num_experts * (work.rank * model.adapted_width + model.adapted_in)
    modules = len(model.linears) + 2 * model.num_adapted
    weights = _ring(group, model.base_parameters * work.base_size + trained * work.size)
    buckets = math.ceil(trained / reduce_bucket(model))
    return [
        Transfer("weights, forward", "all_gather", group, weights, modules, True),
        Transfer("weights, backward", "all_gather", group, weights, modules, True),
        Transfer("gradients", "reduce_scatter", group, _ring(group, trained * work.size), buckets, True),
    ]


def dispatch_traffic(model: ModelShape, work: Workload, choice: Choice) -> list[Transfer]:
    """Between experts and tokens: what `bytes_moved` counts, and one more forward pass where it is recomputed."""
    if choice.ep_size == 1:
        return []
    group, layers = expert_group(work, choice), model.num_adapted
    again = 1 if work.checkpointing else 0
    total = 0.0
    for (in_features, out_features), count in model.adapted_shapes.items():
        sizes = (work.num_experts, choice.ep_size, work.top_k, in_features, out_features, work.rank)
        total += count * bytes_moved(*sizes, work.tokens, work.size)[choice.dispatch]
    if choice.dispatch == "weights":
        once = total / 3  # gather, gather, reduce-scatter, of equal size
        layer_bytes = work.num_experts * work.rank * model.adapted_width * work.size / layers
        calls = math.ceil(layers / max(WINDOW_BYTES // layer_bytes, 1))  # one brings as many layers as a window takes
        return [
            Transfer("experts, forward", "all_gather", group, (1 + again) * once, (1 + again) * calls, True),
            Transfer("experts, backward", "all_gather", group, once, calls, False),
            Transfer("experts' gradients", "reduce_scatter", group, once, calls, False),
        ]
    sent = total * (1 + again / 2)
    return [Transfer("tokens", "all_to_all", group, sent, (ALL_TO_ALLS + 4 * again) * layers, False)]


def step_share(model: ModelShape, work: Workload, choice: Choice) -> GramShare:
    """What the Riemannian step does on one GPU."""
    layers = tuple((m.in_features, m.out_features) for m in model.linears if m.adapted)
    processes = expert_data_group(work, choice).ranks if choice.stage > 0 else 1
    routers = work.num_experts if choice.ep_size == 1 else 0
    return gram_share(layers, work.num_experts // choice.ep_size, work.rank, processes, choice.stage == 3, routers)


def _grams(model: ModelShape, work: Workload, choice: Choice) -> list[Transfer]:
    """One collective, if anything is shared."""
    share = step_share(model, work, choice)
    sent = Transfer("Gram matrices", share.collective, expert_data_group(work, choice), share.sent, 1, False)
    return [sent] if share.sent else []
