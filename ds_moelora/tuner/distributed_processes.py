"""`tuner.processes.Ranks` over torch.distributed and DeepSpeed's partitioned parameters.

Phases of one round of decompositions, `size` layers in a round (`tuner.start.svd_init` runs them):

    1. every layer of the round in turn is gathered (ZeRO-3 only) and copied by the rank that owns it
    2. every rank decomposes its layer; one all-gather of error messages
    3. every layer's triplets are broadcast by their owner, 4 E r (in + out) bytes in fp32; the weight is gathered
       again and changed

so that no rank ever holds more than one whole weight beside its own share of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..optimizer.sharding.zero import is_partitioned
from .processes import OneProcess, Ranks


class DistributedRanks:
    """All processes of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def is_partitioned(self, param: Tensor) -> bool:
        return is_partitioned(param)

    def whole(self, params: Iterable[Tensor], modify: bool = False) -> contextlib.AbstractContextManager[object]:
        partitioned = [param for param in params if self.is_partitioned(param)]
        if not partitioned:
            return contextlib.nullcontext()
        import deepspeed  # not at the top: only who partitions parameters has it for certain

        return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)

    def agree(self, error: Exception | None) -> None:
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"rank {rank}: {message}") from error

    def broadcast(self, tensors: list[Tensor], owner: int) -> None:
        # NCCL moves tensors on its own device alone; gloo all of them through the CPU.
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        for tensor in tensors:
            there = tensor if device is None else tensor.to(device)
            dist.broadcast(there, owner)
            if there is not tensor:
                tensor.copy_(there)


def find_ranks() -> Ranks:
    """The processes that are connected now."""
    return DistributedRanks() if dist.is_available() and dist.is_initialized() else OneProcess()
