"""What preparing a model needs to know of the other processes, without knowing DeepSpeed: who is there, and where
partitioned weights can be had whole.

`OneProcess` is what holds without DeepSpeed. `tuner.distributed_processes` has the other implementation, and
`plugin.register` puts it here by `register_ranks`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The processes that prepare the same model together; all of them call every method but `is_partitioned`."""

    rank: int
    size: int

    def is_partitioned(self, param: Tensor) -> bool:
        """Whether this process has a part of the parameter only (ZeRO-3, `zero.Init`)."""

    def whole(self, params: Iterable[Tensor], modify: bool = False) -> contextlib.AbstractContextManager[object]:
        """Inside, parameters are whole. With `modify`, what rank 0 writes into them is everybody's afterwards."""

    def agree(self, error: Exception | None) -> None:
        """Returns if no rank has an error; raises the first rank's on every rank."""

    def broadcast(self, tensors: list[Tensor], owner: int) -> None:
        """Fills the tensors, in place, with those of rank `owner`."""


class OneProcess:
    """`Ranks` for a process that is alone, or does not know of others."""

    rank, size = 0, 1

    def is_partitioned(self, param: Tensor) -> bool:
        return False

    def whole(self, params: Iterable[Tensor], modify: bool = False) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def agree(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def broadcast(self, tensors: list[Tensor], owner: int) -> None:
        """Nobody else is there."""


_find: Callable[[], Ranks] = OneProcess


def register_ranks(find: Callable[[], Ranks]) -> None:
    """Sets who says which processes there are."""
    global _find
    _find = find


def ranks() -> Ranks:
    """The processes that are there now."""
    return _find()
