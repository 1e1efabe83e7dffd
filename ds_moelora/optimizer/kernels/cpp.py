"""C++ kernels for the optimizer's step on CPUs: `kernels.cpp`, built by `build`.

torch's batched products with an inner dimension of r reach a fraction of the memory's speed, and leave and fetch the
gradient once more for AdamW. Here each expert's rows are read once for the Gram matrix, and once for everything else:

    Gram matrix         G += rows^T rows                      one pass over the weights
    precondition        rows <- rows (G + d I)^-1             one pass over the gradient; or, with AdamW's state,
    and step            the whole update of weight and moments, without writing the gradient

Float32 rows of RANKS elements. The formulas are those of `preconditioner.py`, and results equal its within rounding,
whatever the number of threads, which changes no bit.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .build import load_library
from .rows import AdamWState, RowBlocks

RANKS = (1, 2, 4, 8, 16)
SOURCE = Path(__file__).with_name("kernels.cpp")


@functools.cache
def load_kernels() -> CppKernels:
    """The kernels, loaded once per process.

    Raises:
        ValueError: see `load_library`.
    """
    return CppKernels(load_library(SOURCE))


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _addresses(flats: Sequence[Tensor | None]) -> Tensor:
    return torch.frombuffer(array("q", [0 if flat is None else flat.data_ptr() for flat in flats]), dtype=torch.int64)


class CppKernels:
    """The `Kernels` of a library."""

    name = "cpp"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def covers(self, rank: int, interleaved: bool) -> bool:
        return rank in RANKS and not interleaved

    def refusal(self, weight: Tensor) -> str | None:
        known = weight.dtype == torch.float32 and weight.is_cpu
        return None if known else f"are for float32 weights on CPUs, and there are {weight.dtype} on {weight.device}"

    def _call(self, name: str, rank: int, count: int, *rest: ctypes.c_void_p | ctypes.c_int64 | None) -> None:
        numbers = (ctypes.c_int64(rank), ctypes.c_int64(torch.get_num_threads()), ctypes.c_int64(count))
        getattr(self._library, name)(*numbers, *rest)

    def add_grams_(self, grams: Tensor, rows: RowBlocks, flats: Sequence[Tensor | None]) -> None:
        operands = (_addresses(flats), rows.table, rows.matrix.on(grams.device), grams)
        self._call("add_grams", rows.rank, len(rows.blocks), *map(_at, operands))

    def damped_inverse(self, grams: Tensor, damping: Tensor | float) -> Tensor:
        grams, out = grams.contiguous(), torch.empty_like(grams, memory_format=torch.contiguous_format)
        d = torch.as_tensor(damping, dtype=grams.dtype).contiguous()
        stride = ctypes.c_int64(1 if d.dim() else 0)
        self._call("invert", grams.shape[-1], len(grams), _at(grams), _at(d), stride, _at(out))
        return out

    def precondition_(
        self,
        matrices: Tensor,
        rows: RowBlocks,
        gradients: Sequence[Tensor | None],
        states: Sequence[AdamWState | None] = (),
    ) -> None:
        tables = []
        if any(states):
            # Flat: hundreds of small lists in every step would keep Python's garbage collector busy.
            kept, settings = array("q"), array("d")
            for state in states:
                if state is None:
                    kept.extend((0,) * 4)
                    settings.extend((0.0,) * 5)
                    continue
                weight, average, square = state.weight.data_ptr(), state.exp_avg.data_ptr(), state.exp_avg_sq.data_ptr()
                kept.extend((weight, average, square, state.step.data_ptr()))
                settings.extend(state.settings)
            tables = [torch.frombuffer(kept, dtype=torch.int64), torch.frombuffer(settings, dtype=torch.float64)]
        operands = [_addresses(gradients), rows.table, rows.matrix.on(matrices.device), matrices.contiguous(), *tables]
        padding = [None] * (6 - len(operands))
        self._call("precondition", rows.rank, len(rows.blocks), *map(_at, operands), *padding)
