"""Brings tensors whose parts lie on several processes to process 0, packed into buckets.

Phases of a bucket of at most `BUCKET_BYTES`: every process copies what it owns into zeros; one reduction adds the
buckets up on process 0, as integers, which leaves every bit as it was, because each is given once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .processes import everyone, rank, world_size

BUCKET_BYTES = 1 << 26
ALIGNMENT = 8  # bytes: any dtype can be viewed there


@dataclass(frozen=True, eq=False)
class Segment:
    """A tensor of one parameter that is to be gathered.

    Args:
        name: the parameter's. key: "weight", or the name of the optimizer's state.
        local: this process's elements of it, flat; the first is element `start` of the whole. None: it gives nothing.
    """

    name: str
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    local: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def gather(segments: list[Segment], device: Any, limit: int = BUCKET_BYTES) -> Iterator[tuple[Segment, Tensor]]:
    """Yields whole tensors on process 0's CPU, in order; the other processes get none, but must go through it, too.

    The segments form one sequence of bytes, which is cut every `limit` bytes.

    Raises:
        ValueError: on every process; the processes do not keep the same state.
    """
    plan = [(s.name, s.key, str(s.dtype), s.shape) for s in segments]
    if len(set(everyone(hashlib.sha256(repr(plan).encode()).hexdigest()))) > 1:
        raise ValueError(
            "the processes' optimizers do not keep the same state for the same parameters: this cannot be saved as one "
            "checkpoint. Use DeepSpeed's own (engine.save_checkpoint)."
        )
    *starts, total = accumulate((max(-(-s.nbytes // ALIGNMENT), 1) * ALIGNMENT for s in segments), initial=0)
    placed = list(zip(segments, starts, strict=True))
    whole: dict[Segment, Tensor] = {}
    for first in range(0, total, limit):
        bucket = torch.zeros(min(limit, total - first), dtype=torch.uint8, device=device)
        here = [(s, at) for s, at in placed if at < first + len(bucket) and at + max(s.nbytes, 1) > first]
        for segment, at in here:
            if segment.local is not None:
                mine = segment.local.contiguous().view(torch.uint8)
                _copy_overlap(bucket, first, mine, at + segment.start * segment.dtype.itemsize)
        if world_size() > 1:
            dist.reduce(bucket.view(torch.int32), 0)
        if rank() != 0:
            continue
        bucket = bucket.cpu()
        for segment, at in here:
            if segment not in whole:
                whole[segment] = torch.empty(segment.nbytes, dtype=torch.uint8)
            _copy_overlap(whole[segment], at, bucket, first)
            if at + segment.nbytes <= first + len(bucket):
                yield segment, whole.pop(segment).view(segment.dtype).view(segment.shape)


def _copy_overlap(target: Tensor, target_at: int, source: Tensor, source_at: int) -> None:
    """Copies what two stretches of one sequence have in common, given where each begins."""
    first, stop = max(target_at, source_at), min(target_at + len(target), source_at + len(source))
    if first < stop:
        target[first - target_at : stop - target_at] = source[first - source_at : stop - source_at]
