"""What the processes that prepare, load or save one model do together; each function also holds for one process alone.

All processes call a function, or none does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..optimizer.sharding.zero import is_partitioned


def this_process() -> tuple[int, int]:
    """(number of this process, number of processes); (0, 1) without a process group."""
    connected = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if connected else (0, 1)


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


def raise_together(error: Exception | None) -> None:
    """Returns if no process has an error.

    Raises:
        ValueError: on every process, with the number of the first that has an error, and its message.
    """
    _, size = this_process()
    if size == 1:
        if error is not None:
            raise error
        return
    messages: list[str | None] = [None] * size
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    for process, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"rank {process}: {message}") from error


def broadcast(tensors: Iterable[Tensor], owner: int) -> None:
    """Fills the tensors, in place, with those of process `owner`."""
    if this_process()[1] == 1:
        return
    # NCCL moves tensors on its own device alone; gloo all of them through the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    for tensor in tensors:
        there = tensor if device is None else tensor.to(device)
        dist.broadcast(there, owner)
        if there is not tensor:
            tensor.copy_(there)
