"""The Riemannian step's share of one GPU: which Gram matrices it sums and inverts, and what it exchanges.

The slots of `optimizer.sharding.transfer`, from the positions that the factors have in ZeRO's partitions.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..optimizer.sharding.transfer import Processes, Transfer


class GramShare(NamedTuple):
    """`matrices`: r x r, of the GPU that has most of them. `sent`: bytes per GPU, the mean, by `collective`."""

    matrices: int
    sent: float
    collective: str


@functools.lru_cache(maxsize=256)
def gram_share(
    layers: tuple[tuple[int, int], ...], experts: int, rank: int, processes: int, apart: bool, routers: int
) -> GramShare:
    """Of a step in one process group.

    Args:
        layers: (I, O) of every adapted module, in the model's order. experts: of one GPU before ZeRO.
        processes: over which ZeRO cuts the factors; 1: whole on every GPU. apart: each factor by itself, as ZeRO-3.
        routers: experts that the routers, which lie between the factors in ZeRO-1/2's buffer, have; 0: none there.
    """
    if processes == 1:
        return GramShare(2 * experts * len(layers), 0.0, "all_reduce")
    counts, exchanged = torch.zeros(processes, dtype=torch.long), Counter[str]()
    if apart:
        for layer, times in Counter(layers).items():
            widths = torch.tensor(layer)
            numels = experts * rank * widths
            _exchange(experts, rank, widths, 0 * numels, -(-numels // processes), times, counts, exchanged)
    else:
        widths = torch.tensor(layers)  # (L, 2)
        numels, between = experts * rank * widths, torch.zeros_like(widths)
        between[:, 0] = routers * widths[:, 0]
        between = between.roll(1, 1)  # a router lies behind its B
        ends = (numels + between).flatten().cumsum(0).view_as(widths)
        starts, partition = ends - numels - between, -(-ends[-1, 1] // processes)
        first, last = starts[:, 0] // partition, (starts + numels - 1)[:, 1] // partition
        cut = first != last
        counts.index_add_(0, first[~cut], torch.full_like(first[~cut], 2 * experts))
        widths, starts = widths[cut].flatten(), starts[cut].flatten()
        _exchange(experts, rank, widths, starts, partition.expand_as(widths), 1, counts, exchanged)
    reduced = 2 * (processes - 1) * exchanged["numel"]
    is_direct = exchanged["direct"] < reduced
    sent, collective = min(exchanged["direct"], reduced), "all_to_all" if is_direct else "all_reduce"
    return GramShare(int(counts.max()), 4 * sent / processes, collective)


def _exchange(
    experts: int,
    rank: int,
    widths: Tensor,
    starts: Tensor,
    partitions: Tensor,
    times: int,
    counts: Tensor,
    exchanged: Counter[str],
) -> None:
    """Adds what some pairs, A, B, A, B, ..., bring: `times` over, to matrices per process, and to what is exchanged."""
    processes, size = len(counts), rank * widths
    partner = torch.arange(len(widths)).view(-1, 2).flip(1).flatten()
    first = starts[:, None] + torch.arange(experts) * size[:, None]
    held = first // partitions[:, None], (first + size[:, None] - 1) // partitions[:, None]
    wanted = held[0][partner], held[1][partner]
    transfer = Transfer(0, processes)
    _add(transfer, "grams", rank * rank, held, wanted, symmetric=True)
    # Rows that boundaries cut: weights go where their expert's Gram matrix is wanted, gradients to both sides.
    before = starts // partitions
    num = (starts + experts * size - 1) // partitions - before
    factor = torch.arange(len(widths)).repeat_interleave(num)
    after = before[factor] + 1 + torch.arange(len(factor)) - (num.cumsum(0) - num)[factor]
    at = after * partitions[factor] - starts[factor]
    factor, after, at = (t[at % rank != 0] for t in (factor, after, at))
    sides, expert = (after - 1, after), at // size[factor]
    _add(transfer, "rows", rank, sides, (wanted[0][factor, expert], wanted[1][factor, expert]))
    _add(transfer, "rows", rank, sides, sides)
    both = torch.maximum(held[0], wanted[0]), torch.minimum(held[1], wanted[1])
    met = both[0] <= both[1]
    counts += times * (_per_process(processes, *held) + _per_process(processes, *wanted))
    counts -= times * _per_process(processes, both[0][met], both[1][met])
    exchanged.update(numel=times * transfer.numel, direct=times * transfer.sent_directly)


def _add(
    transfer: Transfer, name: str, width: int, held: Processes, wanted: Processes, symmetric: bool = False
) -> None:
    rows = torch.zeros_like(held[0]).flatten()
    transfer.add(
        name, width, (held[0].flatten(), held[1].flatten()), (wanted[0].flatten(), wanted[1].flatten()), rows, symmetric
    )


def _per_process(processes: int, first: Tensor, last: Tensor) -> Tensor:
    """How many of the ranges [first, last] each process is in."""
    change = torch.zeros(processes + 1, dtype=torch.long)
    ones = torch.ones(first.numel(), dtype=torch.long)
    return change.index_add_(0, first.flatten(), ones).index_add_(0, last.flatten() + 1, -ones).cumsum(0)[:-1]
