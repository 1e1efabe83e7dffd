"""What processes tell each other around a checkpoint; one process alone needs no process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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

    Raises:
        NotFiniteError: some process raised that. kind: every other failure.
    """
    mine = None if failure is None else (isinstance(failure, NotFiniteError), f"{type(failure).__name__}: {failure}")
    found = [(number, told) for number, told in enumerate(everyone(mine)) if told]
    if not found:
        return
    if any(not_finite for _, (not_finite, _) in found):
        raise _agreed(NotFiniteError(next(text.partition(": ")[2] for _, (bad, text) in found if bad))) from failure
    by_text: dict[str, list[int]] = {}
    for number, (_, text) in found:
        by_text.setdefault(text, []).append(number)
    said = "; ".join(f"rank {', '.join(map(str, numbers[:8]))}: {text}" for text, numbers in by_text.items())
    raise _agreed(kind(f"{what} ({said}).")) from failure


def is_agreed(error: Exception) -> bool:
    """Whether `agree` raised this error, and so on every process: the others are in no collective call meanwhile."""
    return bool(getattr(error, "agreed", False))


def _agreed(error: Exception) -> Exception:
    vars(error)["agreed"] = True
    return error
