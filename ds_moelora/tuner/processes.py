"""What the processes that prepare, load or save one model do together; each function also holds for one process alone.

All processes call a function, or none does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.processes import world_size
from ..optimizer.sharding.zero import is_partitioned


def gathered(params: Iterable[Tensor], modify: bool = False) -> contextlib.AbstractContextManager[object]:
    """Inside, partitioned parameters (ZeRO-3, `zero.Init`) are whole.

    Args:
        modify: what process 0 writes into them is everybody's afterwards.
    """
    partitioned = [param for param in params if is_partitioned(param)]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed  # it partitioned them, so it is there; elsewhere it may not be

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def broadcast(tensors: Iterable[Tensor], owner: int) -> None:
    """Fills the tensors, in place, with those of process `owner`."""
    if world_size() == 1:
        return
    # NCCL moves tensors on its own device alone; gloo all of them through the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    for tensor in tensors:
        there = tensor if device is None else tensor.to(device)
        dist.broadcast(there, owner)
        if there is not tensor:
            tensor.copy_(there)
