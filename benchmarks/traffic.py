"""Counts the collectives of this process, and the bytes that it sends if a ring carries them.

n processes, S bytes of the whole buffer: all-reduce 2 (n - 1) / n S, all-gather and reduce-scatter (n - 1) / n S,
broadcast and reduce (n - 1) / n S, all-to-all and gather what leaves the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operator of c10d -> which argument has the bytes, and how many times they leave the process, given n processes. Of an
# input that is this process's share of the whole, S is n times as much.
COLLECTIVES: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce_": (0, lambda n: 2 * (n - 1) / n),
    "allreduce_coalesced_": (0, lambda n: 2 * (n - 1) / n),
    "allgather_": (1, lambda n: n - 1),
    "_allgather_base_": (1, lambda n: n - 1),
    "allgather_into_tensor_coalesced_": (1, lambda n: n - 1),
    "reduce_scatter_": (1, lambda n: (n - 1) / n),
    "_reduce_scatter_base_": (1, lambda n: (n - 1) / n),
    "reduce_scatter_tensor_coalesced_": (1, lambda n: (n - 1) / n),
    "alltoall_": (1, lambda n: (n - 1) / n),
    "alltoall_base_": (1, lambda n: (n - 1) / n),
    "broadcast_": (0, lambda n: (n - 1) / n),
    "reduce_": (0, lambda n: (n - 1) / n),
    "gather_": (1, lambda n: (n - 1) / n),
}


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic: ...` sees every operator that is dispatched inside, whoever calls it.

    Nothing is replaced: torch.distributed's functions, and DeepSpeed's above them, end in the operators of c10d. Every
    other operator is slower meanwhile, so a step is counted or timed, never both.

    Attributes:
        sent: bytes. calls: number of calls by the operator's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.calls = 0.0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            group = next((a for a in args if not isinstance(a, Tensor | list | int | float | bool)), None)
            processes = dist.ProcessGroup.unbox(group).size() if group is not None else 1
            if name in COLLECTIVES and processes > 1:
                position, factor = COLLECTIVES[name]
                self.calls[name] += 1
                self.sent += sum(tensor.nbytes for tensor in tensors_in(args[position])) * factor(processes)
        return func(*args, **(kwargs or {}))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
