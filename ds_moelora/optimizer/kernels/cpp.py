"""C++ kernels for the optimizer's step on CPUs: `kernels.cpp`, built when first asked for.

torch's batched products with an inner dimension of r reach a fraction of the memory's speed, and leave and fetch the
gradient once more for AdamW. Here each expert's rows are read once for the Gram matrix, and once for everything else:

    Gram matrix         G += rows^T rows                      one pass over the weights
    precondition        rows <- rows (G + d I)^-1             one pass over the gradient; or, with AdamW's state,
    and step            the whole update of weight and moments, without writing the gradient

Float32 rows of RANKS elements. The formulas are those of `preconditioner.py`, and results equal its within rounding,
whatever the number of threads, which changes no bit. Every process builds the library for itself in 2 seconds, in a
temporary folder: nothing gets stale, is locked, or is shared by machines with other instructions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
from array import array
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RANKS = (1, 2, 4, 8, 16)
FLOAT = 4  # bytes
Extents = dict[Hashable, list[tuple[int, int]]]  # unit -> (start, end) of elements in its flat tensor
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")  # where there are such vectors; a fifth faster than in halves


@functools.cache
def load_kernels() -> Kernels:
    """The kernels, built once per process.

    Raises:
        ValueError: the compiler is missing or fails.
    """
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(prefix="ds_moelora_") as folder:
        target = Path(folder) / "kernels.so"
        try:
            built = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
            problem = built.stderr[-800:] if built.returncode else ""
        except OSError as error:
            problem = str(error)
        if problem:
            raise ValueError(
                f'"compiled": true needs GCC, and the compiler {compiler!r} did not build {SOURCE.name}: {problem} '
                'Install g++ (or name it in the environment variable CXX), or set "compiled": false.'
            )
        return Kernels(ctypes.CDLL(str(target)))


class RowLayout:
    """Where blocks of whole rows lie within their tensors, and the matrix of every expert in them.

    Args:
        blocks: (experts, rows of each, whether they are stored rank first) of every block.
        matrix: number of the matrix of every expert of all blocks.
    """

    def __init__(self, blocks: Sequence[tuple[int, int, bool]], matrix: Sequence[int]) -> None:
        layout, first = [], 0
        for experts, rows, rank_first in blocks:
            layout += [experts, rows, int(rank_first), first]
            first += experts
        assert first == len(matrix)
        self.count = len(blocks)
        self.layout, self.matrix = torch.tensor(layout), torch.tensor(list(matrix), dtype=torch.long)


class AdamWState(NamedTuple):
    """A weight and what AdamW keeps of it; all float32 on the CPU, contiguous.

    Args:
        step: the number of steps done. settings: lr, beta1, beta2, eps, weight_decay.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    settings: tuple[float, ...]

    def addresses(self, offset: int) -> list[int]:
        """Of element `offset` of weight, exp_avg and exp_avg_sq, and of the step."""
        return [*(t.data_ptr() + FLOAT * offset for t in self[:3]), self.step.data_ptr()]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


class Kernels:
    """The library's functions on tensors. Addresses are those of the blocks' first elements; 0 leaves a block out."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _call(self, name: str, rank: int, count: int, *rest: ctypes.c_void_p | ctypes.c_int64 | None) -> None:
        numbers = (ctypes.c_int64(rank), ctypes.c_int64(torch.get_num_threads()), ctypes.c_int64(count))
        getattr(self._library, name)(*numbers, *rest)

    def add_grams_(self, grams: Tensor, rows: RowLayout, addresses: Sequence[int]) -> None:
        """Adds `rows^T rows` of every expert to its matrix in `grams`, (N, r, r)."""
        where = torch.tensor(addresses)
        self._call("add_grams", grams.shape[-1], rows.count, *map(_at, (where, rows.layout, rows.matrix, grams)))

    def damped_inverse(self, grams: Tensor, damping: Tensor | float) -> Tensor:
        """As `preconditioner.damped_inverse`."""
        grams, out = grams.contiguous(), torch.empty_like(grams, memory_format=torch.contiguous_format)
        d = torch.as_tensor(damping, dtype=grams.dtype).contiguous()
        stride = ctypes.c_int64(1 if d.dim() else 0)
        self._call("invert", grams.shape[-1], len(grams), _at(grams), _at(d), stride, _at(out))
        return out

    def precondition_(
        self,
        inverses: Tensor,
        rows: RowLayout,
        addresses: Sequence[int],
        updates: Sequence[tuple[AdamWState, int] | None] = (),
    ) -> None:
        """Multiplies the rows of every expert by its matrix of `inverses`, (N, r, r): in place, or to step at once.

        Args:
            addresses: of the gradients.
            updates: for each block, to do AdamW's step with the products: the state, and the block's offset in it.
                Gradients then stay as they are, and counting the step is left to the caller. None: the products
                replace the gradients.
        """
        where, inverses = torch.tensor(addresses), inverses.contiguous()
        tables = []
        if any(updates):
            # Flat: hundreds of small lists in every step would keep Python's garbage collector busy.
            state, settings = array("q"), array("d")
            for update in updates:
                state.extend(update[0].addresses(update[1]) if update else (0,) * 4)
                settings.extend(update[0].settings if update else (0.0,) * 5)
            tables = [torch.frombuffer(state, dtype=torch.int64), torch.frombuffer(settings, dtype=torch.float64)]
        operands = [_at(t) for t in (where, rows.layout, rows.matrix, inverses, *tables)]
        self._call("precondition", inverses.shape[-1], rows.count, *operands, *[None] * (6 - len(operands)))
