"""The Riemannian step's share of one GPU: which Gram matrices it sums and inverts, and what it exchanges.

The slots of `optimizer.sharding.transfer`, from the positions that the factors have in ZeRO's partitions.
"""

from __future__ import annotations

import functools
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
    widths = torch.tensor(layers).flatten()  # A, B, A, B, ...
    numels, partner = experts * rank * widths, torch.arange(len(widths)).view(-1, 2).flip(1).flatten()
    if apart:
        starts, partitions = torch.zeros_like(numels), -(-numels // processes)
    else:
        between = torch.stack([torch.zeros(len(layers), dtype=torch.long), routers * widths[::2]], 1).flatten()
        ends = (numels + between).cumsum(0)
        starts, partitions = ends - numels - between, (-(-ends[-1] // processes)).expand_as(numels)
    first = starts[:, None] + torch.arange(experts) * (rank * widths)[:, None]
    held = first // partitions[:, None], (first + rank * widths[:, None] - 1) // partitions[:, None]
    wanted = held[0][partner], held[1][partner]
    transfer = Transfer(0, processes)
    _add(transfer, "grams", rank * rank, held, wanted, symmetric=True)
    # Rows that boundaries cut: weights go where their expert's Gram matrix is wanted, gradients to both sides.
    boundary = torch.arange(1, processes)
    if apart:
        cut = torch.nonzero(partitions % rank)[:, 0]
        factor, after = cut.repeat_interleave(processes - 1), boundary.repeat(len(cut))
    else:
        factor, after = torch.searchsorted(starts, boundary * partitions[0], right=True) - 1, boundary
    at = after * partitions[factor] - starts[factor]
    inside = (at > 0) & (at < numels[factor]) & (at % rank != 0)
    factor, after, at = factor[inside], after[inside], at[inside]
    sides, expert = (after - 1, after), at // (rank * widths[factor])
    _add(transfer, "rows", rank, sides, (wanted[0][factor, expert], wanted[1][factor, expert]))
    _add(transfer, "rows", rank, sides, sides)
    both = torch.maximum(held[0], wanted[0]), torch.minimum(held[1], wanted[1])
    met = both[0] <= both[1]
    counts = _per_process(processes, *held) + _per_process(processes, *wanted)
    counts -= _per_process(processes, both[0][met], both[1][met])
    return GramShare(int(counts.max()), 4 * transfer.sent_by_all / processes, transfer.collective)


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
