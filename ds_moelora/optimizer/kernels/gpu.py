"""Triton kernels for the optimizers' step on GPUs: a few launches, whatever the depth.

    add_grams          a program sums one expert's rows, in one order: the same bits on every run
    damped_inverse     a program inverts one matrix, with the checks of `preconditioner.damped_inverse`
    move               a program sums the parts of what processes have sent each other, in one order
    step_rows          a program multiplies one expert's rows by its matrix, and takes AdamW's step with them

Each launch is one operator of torch's dispatcher, so that FakeTensors and counters see it. Units are found by a table
of their addresses on the device, copied there when they have changed: with flat partitions, never. TRITON_INTERPRET=1
runs the kernels on CPU tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...mixture.triton_operators import INTERPRETED, operator
from ..preconditioner import RELATIVE_DAMPING
from .rows import AdamWState, Moves, RowBlocks, capturing
from .triton_kernels import MOVED, add_grams, damped_inverse, move, square_of, step_rows, tile_of

MAX_RANK = 64
KEPT_TABLES = 64

_tables: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}


def _addresses(device: torch.device, *lists: Sequence[Tensor]) -> Tensor:
    """(lists, units) on the device; 0 for tensors without elements."""
    found = tuple(t.data_ptr() if t.numel() else 0 for tensors in lists for t in tensors)
    key = (device, found)
    if key not in _tables:
        if capturing():
            raise ValueError(
                "a CUDA graph cannot capture this step: gradients or weights have moved since the last one. Keep them "
                "in place: zero_grad(set_to_none=False)."
            )
        if len(_tables) >= KEPT_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = torch.tensor(found, dtype=torch.int64, device=device)
    return _tables[key]


def _add_grams(grams: Tensor, flats: list[Tensor], table: Tensor, rank: int) -> None:
    add_grams[(len(table),)](_addresses(grams.device, flats), table, grams, rank, **tile_of(rank, True))


def _damped_inverse(out: Tensor, grams: Tensor, damping: Tensor | None, d: float) -> None:
    rank = grams.shape[-1]
    damped_inverse[(len(grams),)](out, grams, damping, d, RELATIVE_DAMPING, rank, **square_of(rank))


def _step_rows(
    gradients: list[Tensor],
    weights: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    matrices: Tensor | None,
    table: Tensor,
    rank: int,
    lr: Tensor | None,
    settings: list[float],
) -> None:
    lists = [gradients, weights, averages, squares, steps]
    addresses = _addresses(table.device, *lists[: 5 if weights else 1])
    step_rows[(len(table),)](
        addresses, len(gradients), table, matrices, lr, *settings, rank, bool(weights), **tile_of(rank)
    )


def _move(flats: list[Tensor], lines: Tensor, parts: Tensor) -> None:
    move[(len(lines),)](_addresses(lines.device, flats), lines, parts, BLOCK=MOVED)


operator("add_grams(Tensor(a!) grams, Tensor[] flats, Tensor table, int rank) -> ()", _add_grams)
operator("damped_inverse(Tensor(a!) out, Tensor grams, Tensor? damping, float d) -> ()", _damped_inverse)
operator(
    "step_rows(Tensor(a!)[] gradients, Tensor(b!)[] weights, Tensor(c!)[] averages, Tensor(d!)[] squares, "
    "Tensor[] steps, Tensor? matrices, Tensor table, int rank, Tensor? lr, float[] settings) -> ()",
    _step_rows,
)
operator("move(Tensor(a!)[] flats, Tensor lines, Tensor parts) -> ()", _move)


class TritonKernels:
    """The `Kernels` of this module."""

    name = "triton"

    def covers(self, rank: int, interleaved: bool) -> bool:
        return rank <= MAX_RANK

    def refusal(self, weight: Tensor) -> str | None:
        known = weight.dtype == torch.float32 and (weight.is_cuda or INTERPRETED)
        return None if known else f"are for float32 weights on GPUs, and there are {weight.dtype} on {weight.device}"

    def add_grams_(self, grams: Tensor, rows: RowBlocks, flats: Sequence[Tensor | None]) -> None:
        torch.ops.ds_moelora.add_grams(grams, _present(flats, grams), rows.experts_on(grams.device), rows.rank)

    def damped_inverse(self, grams: Tensor, damping: Tensor | float) -> Tensor:
        out = torch.empty_like(grams, memory_format=torch.contiguous_format)
        each, number = (damping, 0.0) if isinstance(damping, Tensor) else (None, damping)
        torch.ops.ds_moelora.damped_inverse(out, grams.contiguous(), each, number)
        return out

    def precondition_(
        self,
        matrices: Tensor,
        rows: RowBlocks,
        gradients: Sequence[Tensor | None],
        states: Sequence[AdamWState | None] = (),
    ) -> None:
        self._step(matrices.contiguous(), rows.experts_on(matrices.device), rows.rank, gradients, states)

    def step_extents_(self, extents: Tensor, gradients: Sequence[Tensor], states: Sequence[AdamWState]) -> None:
        """AdamW's step of elements that belong to no row: `extents` is a `rows.extent_table`."""
        self._step(None, extents, 1, gradients, states)

    def move_(self, moves: Moves, tensors: Mapping[Any, Tensor | None], device: torch.device) -> None:
        """Does `moves` with float32 tensors by name; those that are None count as zeros."""
        if moves:
            lines, parts = moves.on(device)
            flats = _present([tensors[name] for name in moves.units], lines)
            torch.ops.ds_moelora.move(flats, lines, parts)

    @staticmethod
    def _step(
        matrices: Tensor | None,
        table: Tensor,
        rank: int,
        gradients: Sequence[Tensor | None],
        states: Sequence[AdamWState | None],
    ) -> None:
        """One launch for the units of a group."""
        states = states or [None] * len(gradients)
        all_settings = [None if state is None else state.settings for state in states]
        distinct = {id(own): own for own in all_settings}  # by identity: the host knows no tensor's value
        for settings in distinct.values():
            here = [own is settings for own in all_settings]
            mine = [state if own else None for state, own in zip(states, here, strict=True)]
            flats = _present([g if own else None for g, own in zip(gradients, here, strict=True)], table)
            if all(flat.numel() == 0 for flat in flats):
                continue
            kept: list[list[Tensor]] = [[], [], [], []]
            lr, numbers = None, [0.0] * 9
            if settings is not None:
                names = ("weight", "exp_avg", "exp_avg_sq", "step")
                kept = [_present([None if s is None else getattr(s, name) for s in mine], table) for name in names]
                lr, numbers = _numbers(settings)
            torch.ops.ds_moelora.step_rows(flats, *kept, matrices, table, rank, lr, numbers)


def _present(flats: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    absent = like.new_empty(0)
    return [absent if flat is None else flat for flat in flats]


def _numbers(settings: tuple[Any, ...]) -> tuple[Tensor | None, list[float]]:
    """lr if it is a tensor, and what `step_rows` takes: kernels get float32, and log(beta) needs more."""
    lr, beta1, beta2, eps, weight_decay = settings
    numbers = [0.0 if isinstance(lr, Tensor) else lr, beta1, beta2, eps, weight_decay]
    for beta in (beta1, beta2):
        log = math.log(beta) if beta > 0 else -1e30
        (high,) = struct.unpack("f", struct.pack("f", log))
        numbers += [high, log - high]
    return (lr if isinstance(lr, Tensor) else None), numbers
