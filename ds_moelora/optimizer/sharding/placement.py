"""Where the factors of low-rank pairs lie in flat, partitioned buffers: integer arithmetic, no weights, no groups.

Vocabulary.
    factor     one lora_A or lora_B, flattened: (E, n, r) elements, n = in or out; row j belongs to expert j // n.
    space      a flat buffer that is cut into equal partitions, one per process: a ZeRO-1/2 parameter group, or, at
               ZeRO-3, the factor itself.
    unit       what one call of `optimizer.step()` updates: a parameter, one ZeRO-1/2 group, one ZeRO-3 sub-group.
    cut row    a row of r elements that a boundary between two processes (or more) cuts.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One parameter's place. All but `local_offset` and `process` are equal in every process of the group.

    Args:
        numel: elements of the whole parameter.
        unit: the optimizer call that updates it.
        position: of its first element in its space.
        partition: elements per process in that space.
        local_offset: where this process's slice begins in the local flat tensor of `unit`.
        process, world: this process's index in the group over which the space is partitioned, and that group's size.
        group: that process group; None where nothing is partitioned.
    """

    numel: int
    unit: Hashable
    position: int = 0
    partition: int
    local_offset: int = 0
    process: int = 0
    world: int = 1
    group: Any = None

    @property
    def start(self) -> int:
        """First element that this process owns."""
        return min(max(self.process * self.partition - self.position, 0), self.numel)

    @property
    def stop(self) -> int:
        """One past the last element that this process owns."""
        return min(max((self.process + 1) * self.partition - self.position, 0), self.numel)

    def cut_rows(self, row_numel: int) -> list[int]:
        """Rows (of `row_numel` elements) that lie in more than one process, in order; the same list everywhere."""
        if self.position % row_numel == 0 == self.partition % row_numel:
            return []
        first = max(self.position // self.partition + 1, 1)
        stop = min(-(-(self.position + self.numel) // self.partition), self.world)
        boundaries = (process * self.partition - self.position for process in range(first, stop))
        return sorted({b // row_numel for b in boundaries if 0 < b < self.numel and b % row_numel})

    def processes(self, row_numel: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last process that have elements of each of `rows`, of `row_numel` elements."""
        first = self.position + rows * row_numel
        last = first + max(row_numel, 1) - 1
        return tuple(torch.div(at, self.partition, rounding_mode="floor") for at in (first, last))  # type: ignore[return-value]

    def touched(self, row_numel: int) -> range:
        """The rows of which this process has elements."""
        if self.start >= self.stop:
            return range(0)
        return range(self.start // row_numel, (self.stop - 1) // row_numel + 1)


@dataclass(frozen=True)
class Piece:
    """This process's part of a cut row: `length` elements from `column` on, at `offset` in its slice."""

    row: int
    column: int
    offset: int
    length: int


def split_slice(start: int, stop: int, row_numel: int) -> tuple[list[Piece], int, int]:
    """Cuts the slice [start, stop) of a factor into whole rows and pieces of cut rows.

    Returns:
        pieces: at most two, head and tail.
        first_row, num_rows: of the whole rows; the first of them is at `first_row * row_numel - start` in the slice.
    """
    first_row, end_row = -(-start // row_numel), stop // row_numel
    pieces = []
    if start % row_numel and start < stop:
        length = min(stop, first_row * row_numel) - start
        pieces.append(Piece(first_row - 1, start % row_numel, 0, length))
    tail = max(end_row * row_numel, start)
    # A slice inside one row is a single piece: the head above, unless it begins where the row does.
    if tail < stop and not (pieces and pieces[0].row == end_row):
        pieces.append(Piece(end_row, tail % row_numel, tail - start, stop - tail))
    return pieces, first_row, max(end_row - first_row, 0)


def expert_blocks(first_row: int, num_rows: int, rows_per_expert: int) -> list[tuple[int, int, int, int]]:
    """Cuts consecutive rows into blocks of equally many rows per expert: a part, whole experts, a part.

    Returns:
        list of (expert, num_experts, row, rows_per_block): `num_experts` blocks of `rows_per_block` rows each, the
        first at row `row` (counted from `first_row`) and belonging to expert `expert`. At most three.
    """
    n, stop = rows_per_expert, first_row + num_rows
    whole = min(-(-first_row // n) * n, stop)
    rest = max(stop // n * n, whole)
    parts = ((first_row, whole, whole - first_row), (whole, rest, n), (rest, stop, stop - rest))
    return [(row // n, (end - row) // size, row - first_row, size) for row, end, size in parts if row < end]
