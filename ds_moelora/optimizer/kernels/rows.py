"""What kernels are told of a step: where rows lie in flat tensors, and what AdamW keeps of these.

Kernels are one object with three functions (`Kernels`). They are given the flat tensors of units, in every step anew,
and blocks that stay: which rows of which unit belong to which r x r matrix.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 1 << 14  # elements that one program of a GPU steps
# A product over this many elements is long enough to hide what a call costs, and its operands still fit in a cache.
MERGED_NUMEL = 1 << 18
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


class Index(list[int]):
    """Indices known on the host, and on the device from the first use on."""

    tensor: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        if self.tensor is None or self.tensor.device != device:
            self.tensor = torch.tensor(self, dtype=torch.long, device=device)
        return self.tensor


class RowBlock(NamedTuple):
    """`rows` whole rows of each of `experts` consecutive experts, in the flat tensor of `source`.

    The experts may be those of several factors that lie one behind the other.
    """

    source: Hashable
    offset: int
    experts: int
    rows: int
    rank: int
    transposed: bool
    interleaved: bool = False  # (rows, rank, experts)
    distance: int = 0  # in a table of interleaved rows: (rows, distance, rank), of which `experts` are meant

    @property
    def end(self) -> int:
        return self.offset + self.experts * self.rows * self.rank

    @property
    def strides(self) -> tuple[int, int, int]:
        """Between experts, rows, and the elements of a row."""
        r, rows = self.rank, self.rows
        if self.distance:
            return r, self.distance * r, 1
        if self.interleaved:
            return 1, self.experts * r, self.experts
        return (rows * r, 1, rows) if self.transposed else (rows * r, r, 1)

    def view(self, flat: Tensor) -> Tensor:
        shape = (self.experts, self.rows, self.rank)
        return flat.as_strided(shape, self.strides, flat.storage_offset() + self.offset)

    def continued_by(self, other: RowBlock) -> bool:
        """True if `other` lies directly behind, looks the same, and both together are not too many for the caches."""
        same = (self.source, *self[3:]) == (other.source, *other[3:])
        mergeable = same and not self.transposed and not self.interleaved
        return mergeable and self.end == other.offset and other.end - self.offset <= MERGED_NUMEL


class RowBlocks:
    """Blocks of equal rank, as few as possible, and the r x r matrix of every expert in them.

    Args:
        rank, interleaved: of all of them.
    """

    def __init__(self, rank: int, interleaved: bool = False) -> None:
        self.rank, self.interleaved = rank, interleaved
        self.blocks: list[RowBlock] = []
        self.matrix = Index()  # (to add to, or to multiply by) among those of equal rank
        self._experts: Tensor | None = None

    def add(self, block: RowBlock, matrices: Sequence[int]) -> None:
        """Puts a block behind the others; `matrices` are those of its experts."""
        self.matrix.extend(matrices)
        if self.blocks and self.blocks[-1].continued_by(block):
            last = self.blocks.pop()
            block = last._replace(experts=last.experts + block.experts)
        self.blocks.append(block)

    @property
    def counts(self) -> list[int]:
        return [block.experts for block in self.blocks]

    @cached_property
    def units(self) -> list[Hashable]:
        """What kernels are given tensors of; below, a unit is its number among them."""
        return list(dict.fromkeys(block.source for block in self.blocks))

    @cached_property
    def table(self) -> Tensor:
        """(blocks, 6): unit, offset, experts, rows, stride of a row's elements, number of the first expert."""
        found, first = [], 0
        for b in self.blocks:
            found.append([self.units.index(b.source), b.offset, b.experts, b.rows, b.strides[2], first])
            first += b.experts
        return torch.tensor(found, dtype=torch.long).view(-1, 6)

    def experts_on(self, device: torch.device) -> Tensor:
        """(experts, 6) on a device: unit, offset, rows, stride of rows, stride of a row's elements, matrix."""
        if self._experts is None or self._experts.device != device:
            lines, matrices = [], iter(self.matrix)
            for b in self.blocks:
                unit, (between, row_stride, stride) = self.units.index(b.source), b.strides
                for e in range(b.experts):
                    lines.append([unit, b.offset + e * between, b.rows, row_stride, stride, next(matrices)])
            self._experts = torch.tensor(lines, dtype=torch.long).view(-1, 6).to(device)
        return self._experts

    @cached_property
    def extents(self) -> Extents:
        """The elements of each unit in the blocks; of those without gaps alone."""
        found: Extents = {}
        for block in self.blocks:
            found.setdefault(block.source, []).append((block.offset, block.end))
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
    """As `RowBlocks.experts_on`, of elements in no row: a list of (start, end) for each unit; rows of one element."""
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

    def add_grams_(self, grams: Tensor, rows: RowBlocks, flats: Sequence[Tensor | None]) -> None:
        """Adds `rows^T rows` of every expert to its matrix in `grams`, (N, r, r) float32."""

    def damped_inverse(self, grams: Tensor, damping: Tensor | float) -> Tensor:
        """As `preconditioner.damped_inverse`."""

    def precondition_(
        self,
        matrices: Tensor,
        rows: RowBlocks,
        gradients: Sequence[Tensor | None],
        states: Sequence[AdamWState | None] = (),
    ) -> None:
        """Multiplies the rows of every expert by its matrix of `matrices`, (N, r, r): in place, or to step at once.

        Args:
            gradients: of the units.
            states: of the units, to do AdamW's step with the products. Gradients then stay as they are, and counting
                the step is left to the caller. None, or empty: the products replace the gradients.
        """
