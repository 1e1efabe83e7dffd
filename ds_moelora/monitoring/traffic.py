"""Counts what this rank hands to torch.distributed: calls, and the bytes that it sends if a ring carries them.

n ranks, S bytes of the whole buffer: all-reduce 2 (n - 1) / n S, all-gather and reduce-scatter (n - 1) / n S, broadcast
and reduce (n - 1) / n S, all-to-all and gather what leaves the rank. DeepSpeed's collectives end in the same functions
(but for those of its inference kernels).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Parameter whose bytes are handed over, and how many times they leave the rank, given n ranks. Of an input that is this
# rank's share of the whole, S is n times as much.
_COLLECTIVES: dict[str, tuple[str, Callable[[int], float]]] = {
    "all_reduce": ("tensor", lambda n: 2 * (n - 1) / n),
    "all_gather": ("tensor", lambda n: n - 1),
    "all_gather_into_tensor": ("input_tensor", lambda n: n - 1),
    "reduce_scatter": ("input_list", lambda n: (n - 1) / n),
    "reduce_scatter_tensor": ("input", lambda n: (n - 1) / n),
    "all_to_all": ("input_tensor_list", lambda n: (n - 1) / n),
    "all_to_all_single": ("input", lambda n: (n - 1) / n),
    "broadcast": ("tensor", lambda n: (n - 1) / n),
    "reduce": ("tensor", lambda n: (n - 1) / n),
    "gather": ("tensor", lambda n: (n - 1) / n),
}


class CommMeter:
    """Counts between `start()` and `stop()`; costs nothing outside.

    Functions of torch.distributed are replaced meanwhile, where everybody looks them up: in `torch.distributed`, in
    `torch.distributed.distributed_c10d` and in DeepSpeed's backend, which keeps some of them in attributes. Several
    meters may run, and stop in the reverse order.

    Attributes:
        sent: bytes. calls: number of calls by the function's name.
    """

    def __init__(self) -> None:
        self.sent, self.calls = 0.0, Counter[str]()
        self._originals: list[tuple[Any, str, Any]] = []

    def start(self) -> None:
        """From zero."""
        self.stop()
        self.sent, self.calls = 0.0, Counter()
        if not dist.is_available():
            return
        counted = {getattr(dist, name): self._counted(name, getattr(dist, name)) for name in _COLLECTIVES}
        for owner in (dist, dist.distributed_c10d, *_deepspeeds_backend()):
            for name, original in list(vars(owner).items()):
                if callable(original) and getattr(original, "__hash__", None) and original in counted:
                    self._originals.append((owner, name, original))
                    setattr(owner, name, counted[original])

    def stop(self) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def _counted(self, name: str, original: Any) -> Any:
        parameter, factor = _COLLECTIVES[name]
        parameters = list(inspect.signature(original).parameters)
        position, group_position = parameters.index(parameter), parameters.index("group")

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            handed = args[position] if len(args) > position else kwargs.get(parameter)
            group = args[group_position] if len(args) > group_position else kwargs.get("group")
            ranks = dist.get_world_size(group)
            if ranks > 1:
                self.calls[name] += 1
                self.sent += _bytes(handed) * factor(ranks)
            return original(*args, **kwargs)

        return counted


def _deepspeeds_backend() -> list[Any]:
    comm = sys.modules.get("deepspeed.comm.comm")
    backend = getattr(comm, "cdb", None)
    return [] if backend is None else [backend]


def _bytes(handed: Any) -> int:
    if isinstance(handed, Tensor):
        return handed.nbytes
    return sum(tensor.nbytes for tensor in handed)
