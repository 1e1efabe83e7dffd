"""Kernels for the optimizers' step, behind one call: C++ for CPUs (`cpp`), Triton for GPUs (`gpu`), or none (torch).

rows    the interface, and what kernels are told
build   one build of the C++ per machine
adamw   AdamW's step in the same pass as the preconditioner
"""

from __future__ import annotations

import functools
import logging
import os

from torch import Tensor

from ...mixture.triton_operators import NO_TRITON
from .cpp import load_kernels
from .rows import Kernels

CHOICES = ("auto", "torch", "cpp", "triton")
logger = logging.getLogger("ds_moelora")


def load(choice: str) -> Kernels | None:
    """The kernels of a choice but "auto"; None: torch does the work.

    Raises:
        ValueError: no such choice, or what it needs is missing.
    """
    if choice == "cpp":
        return load_kernels()
    if choice == "triton":
        if NO_TRITON is not None:
            raise ValueError(f'kernels "triton" need Triton: {NO_TRITON}. Or set "kernels": "torch".')
        from .gpu import TritonKernels

        return TritonKernels()
    if choice not in CHOICES:
        raise ValueError(f"kernels={choice!r} is unknown; choose one of {', '.join(map(repr, CHOICES))}.")
    return None


def choose(
    choice: str, loaded: Kernels | None, weights: list[Tensor], ranks: set[int], replicated: bool
) -> Kernels | None:
    """The kernels for the weights of an optimizer, where they lie now.

    Args:
        choice: the optimizer's `kernels`. loaded: of it.
        weights: a flat tensor of each unit. ranks: of the pairs.
        replicated: other processes step the same weights. All must round alike, and one may lack what "auto" takes
            here: torch then.

    Raises:
        ValueError: the choice would have no effect.
    """
    if choice == "auto":
        candidate = None if replicated else _automatic(weights[0].device.type)
        usable = candidate is not None and _refusal(candidate, weights, ranks) is None
        return candidate if usable else None
    reason = loaded and _refusal(loaded, weights, ranks)
    if reason:
        raise ValueError(f'kernels "{choice}" {reason}; set "kernels": "torch", or "auto".')
    return loaded


def _refusal(kernels: Kernels, weights: list[Tensor], ranks: set[int]) -> str | None:
    if not any(kernels.covers(rank, False) for rank in ranks):
        return f"would have no effect: there are pairs of rank {sorted(ranks)}"
    return next(filter(None, map(kernels.refusal, weights)), None)


@functools.cache
def _automatic(device: str) -> Kernels | None:
    """The kernels that "auto" takes for weights on a kind of device; None: there are none."""
    if device not in ("cpu", "cuda") or (device == "cuda" and NO_TRITON is not None):
        return None
    try:
        return load("cpp" if device == "cpu" else "triton")
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each machine
            logger.warning("The optimizer's step is torch's, about half as fast: %s", error)
        return None
