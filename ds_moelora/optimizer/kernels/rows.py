"""What kernels are told of a step: where rows lie in flat tensors, and what AdamW keeps of these.

Kernels are one object with three functions (`Kernels`). They are given the flat tensors of units, in every step anew,
and a layout that stays: which rows of which unit belong to which r x r matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 1 << 14  # elements that one program of a GPU steps
Extents = dict[Hashable, list[tuple[int, int]]]  # unit -> (start, end) of elements in its flat tensor


@dataclass(slots=True)
class AdamWState:
    """A weight and what AdamW keeps of it; all float32 and contiguous.

    Args:
        step: the number of steps done. settings: lr (a number, or a tensor), beta1, beta2, eps,
            weight_decay.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    settings: tuple[Any, ...]


class Block(NamedTuple):
    """`rows` whole rows of each of `experts` consecutive experts, from element `offset` of the tensor of unit `unit`.

    Args:
        strides: between experts, rows, and the elements of a row.
    """

    unit: int
    offset: int
    experts: int
    rows: int
    strides: tuple[int, int, int]


class RowLayout:
    """Where blocks of rows of `rank` elements lie, and the matrix of every expert in them.

    Args:
        units: what a block's `unit` is the number of. blocks: one behind the other in `matrix`.
        matrix: number of the matrix of every expert of all blocks.
    """

    def __init__(self, units: Sequence[Hashable], blocks: Sequence[Block], matrix: Sequence[int], rank: int) -> None:
        assert sum(block.experts for block in blocks) == len(matrix)
        self.units, self.blocks, self.rank = list(units), list(blocks), rank
        self.numbers = list(matrix)
        self._experts: Tensor | None = None

    @cached_property
    def matrix(self) -> Tensor:
        """(experts,): the number of each one's matrix."""
        return torch.tensor(self.numbers, dtype=torch.long)

    @cached_property
    def table(self) -> Tensor:
        """(blocks, 6): unit, offset, experts, rows, stride of a row's elements, number of the first expert."""
        found, first = [], 0
        for block in self.blocks:
            found.append([block.unit, block.offset, block.experts, block.rows, block.strides[2], first])
            first += block.experts
        return torch.tensor(found, dtype=torch.long).view(-1, 6)

    def experts_on(self, device: torch.device) -> Tensor:
        """(experts, 6) on a device: unit, offset, rows, stride of rows, stride of a row's elements, matrix."""
        if self._experts is None or self._experts.device != device:
            lines, matrices = [], iter(self.numbers)
            for unit, offset, experts, rows, (between, row_stride, stride) in self.blocks:
                for e in range(experts):
                    lines.append([unit, offset + e * between, rows, row_stride, stride, next(matrices)])
            self._experts = torch.tensor(lines, dtype=torch.long).view(-1, 6).to(device)
        return self._experts

    @cached_property
    def extents(self) -> Extents:
        """The elements of each unit in the layout; blocks without gaps alone."""
        found: Extents = {}
        for block in self.blocks:
            end = block.offset + block.experts * block.rows * self.rank
            found.setdefault(self.units[block.unit], []).append((block.offset, end))
        return found


class Moves:
    """Elements of flat tensors that become sums of elements of others, in the order given: one launch.

    A matrix may lie there packed: its upper triangle, row by row. Of an unpacked one, too, that triangle alone is read.
    """

    def __init__(self) -> None:
        self.units: dict[Hashable, int] = {}  # what tensors are to be given, and their numbers
        self._lines: list[list[int]] = []  # unit, offset, elements, side, packed, first part, parts
        self._parts: list[list[int]] = []  # unit, offset, packed
        self._tensors: tuple[Tensor, Tensor] | None = None

    def add(
        self,
        target: Hashable,
        at: int,
        parts: Sequence[tuple[Hashable, int, bool]],
        numel: int,
        side: int = 0,
        packed: bool = False,
    ) -> None:
        """Makes `numel` elements of `target`, from `at` on, the sum of `parts` (tensor, offset, packed).

        Args:
            side: of a matrix of `numel` elements; 0: it is none. packed: in the target.
        """
        names = [target, *(name for name, _, _ in parts)]
        unit, *sources = [self.units.setdefault(name, len(self.units)) for name in names]
        self._lines.append([unit, at, numel, side or numel, int(packed), len(self._parts), len(parts)])
        self._parts += [
            [source, offset, int(triangle)] for source, (_, offset, triangle) in zip(sources, parts, strict=True)
        ]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(lines, 7) and (parts, 3), on a device."""
        if self._tensors is None or self._tensors[0].device != device:
            lines, parts = (torch.tensor(t, dtype=torch.long).to(device) for t in (self._lines, self._parts))
            self._tensors = lines.view(-1, 7), parts.view(-1, 3)
        return self._tensors

    def __len__(self) -> int:
        return len(self._lines)


def capturing() -> bool:
    """Whether a CUDA graph records what is launched now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def extent_table(extents: Sequence[list[tuple[int, int]]], device: torch.device) -> Tensor:
    """As `RowLayout.experts_on`, of elements in no row: a list of (start, end) for each unit; rows of one element."""
    chunks = [
        [unit, start, min(CHUNK, end - start), 1, 1, 0]
        for unit, parts in enumerate(extents)
        for begin, end in parts
        for start in range(begin, end, CHUNK)
    ]
    return torch.tensor(chunks, dtype=torch.long).view(-1, 6).to(device)


class Kernels(Protocol):
    """The work on rows. A unit's tensor, or its state, may be None: then its blocks are left out."""

    name: str

    def covers(self, rank: int, interleaved: bool) -> bool:
        """Whether there are kernels for rows of so many elements; `interleaved`: an expert's rows are no extent."""

    def refusal(self, weight: Tensor) -> str | None:
        """Why these kernels cannot step a weight: its dtype, or its device. None: they can."""

    def add_grams_(self, grams: Tensor, rows: RowLayout, flats: Sequence[Tensor | None]) -> None:
        """Adds `rows^T rows` of every expert to its matrix in `grams`, (N, r, r) float32."""

    def damped_inverse(self, grams: Tensor, damping: Tensor | float) -> Tensor:
        """As `preconditioner.damped_inverse`."""

    def precondition_(
        self,
        matrices: Tensor,
        rows: RowLayout,
        gradients: Sequence[Tensor | None],
        states: Sequence[AdamWState | None] = (),
    ) -> None:
        """Multiplies the rows of every expert by its matrix of `matrices`, (N, r, r): in place, or to step at once.

        Args:
            gradients: of the units.
            states: of the units, to do AdamW's step with the products. Gradients then stay as they are, and counting
                the step is left to the caller. None, or empty: the products replace the gradients.
        """
