"""What the processes that prepare, load or save one model do together; one process alone needs no process group.

All processes call a function, or none does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optimizer.sharding.zero import is_partitioned


class NotFiniteError(ValueError):
    """Weights or optimizer state hold NaN or infinity: they are not saved."""


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone(mine: Any) -> list[Any]:
    """Every process's value, on every process; a collective call."""
    if world_size() == 1:
        return [mine]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, mine)
    return values


def agree(failure: Exception | None, what: str, kind: type[Exception] = RuntimeError) -> None:
    """Raises on every process if any has failed: none goes on alone, and none waits for one that is gone.

    Args:
        what: begins the message, unless weights were not finite, or all processes raised the same plain ValueError:
            those speak for themselves.

    Raises:
        NotFiniteError: some process raised that. kind: every other failure.
    """
    mine = None if failure is None else (isinstance(failure, NotFiniteError), type(failure).__name__, str(failure))
    reports = everyone(mine)
    found = [report for report in reports if report]
    if not found:
        return
    not_finite = [text for bad, _, text in found if bad]
    if not_finite:
        error: Exception = NotFiniteError(not_finite[0])
    elif len(set(reports)) == 1 and type(failure) is ValueError:
        error = kind(str(failure))
    else:
        ranks = {report: [str(n) for n, other in enumerate(reports) if other == report][:8] for report in found}
        said = "; ".join(f"rank {', '.join(numbers)}: {name}: {text}" for (_, name, text), numbers in ranks.items())
        error = kind(f"{what} ({said}).")
    vars(error)["agreed"] = True
    raise error from failure


@contextmanager
def together(what: str, *expected: type[Exception], kind: type[Exception] = RuntimeError) -> Iterator[None]:
    """`agree` on what is raised inside.

    Args:
        expected: what is caught; anything else ends this process alone.
    """
    failure = None
    try:
        yield
    except expected as error:
        failure = error
    agree(failure, what, kind)


def is_agreed(error: Exception) -> bool:
    """Whether `agree` raised this error, and so on every process: the others are in no collective call meanwhile."""
    return bool(getattr(error, "agreed", False))


def gathered(params: Iterable[Tensor], modify: bool = False) -> AbstractContextManager[object]:
    """Inside, partitioned parameters (ZeRO-3, `zero.Init`) are whole.

    Args:
        modify: what process 0 writes into them is everybody's afterwards.
    """
    partitioned = [param for param in params if is_partitioned(param)]
    if not partitioned:
        return nullcontext()
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
