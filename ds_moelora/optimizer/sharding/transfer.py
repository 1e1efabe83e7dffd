"""Sums over processes, each brought to the processes that want it, in one collective.

A slot is a row of a table: a Gram matrix, a row of a factor that a boundary cuts, a whole expert. Consecutive processes
hold parts of it, and consecutive processes want their sum. With N processes, n slots of w elements, and c processes
that hold and d that want each of them:

    direct        every part goes to every process that wants the slot        n w (c d - those that do both)
    all-reduce    one zero-filled buffer of all slots, which everybody gets   2 (N - 1) n w

elements on all links together; the smaller one is taken. Direct parts are added in the order of their processes, and an
all-reduce gives everybody the same: processes that want a slot get the same bits. Of a Gram matrix one triangle
travels. Slots of one process, held and wanted there alone, take no part. Everything follows from placements, which all
processes share.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.rows import Index, Moves

Processes = tuple[Tensor, Tensor]  # the first and the last one, of every slot


def rounds(targets: list[int]) -> list[tuple[Index, Index]]:
    """(positions, targets): every position once, in order, no target twice in a round. Sums then have one order."""
    seen: dict[int, int] = {}
    found: list[tuple[Index, Index]] = []
    for position, target in enumerate(targets):
        count = seen[target] = seen.get(target, -1) + 1
        if count == len(found):
            found.append((Index(), Index()))
        found[count][0].append(position)
        found[count][1].append(target)
    return found


class _Slot(NamedTuple):
    row: int  # in this process's table
    number: int  # among the table's slots in all processes
    held: range
    wanted: range


class _Table:
    """The slots of one table that concern this process, and how many there are in all."""

    def __init__(self, width: int, side: int) -> None:
        self.side = side
        self.numel = width
        self.width = side * (side + 1) // 2 if side else width  # of what travels
        self.count = 0
        self.slots: list[_Slot] = []

    @cached_property
    def kept(self) -> Index:
        """The elements of a symmetric matrix that travel."""
        return Index(a * self.side + b for a in range(self.side) for b in range(a, self.side))

    @cached_property
    def spread(self) -> Index:
        """Where each element of the matrix is among these."""
        place = {element: k for k, element in enumerate(self.kept)}
        sides = range(self.side)
        return Index(place[min(a, b) * self.side + max(a, b)] for a in sides for b in sides)

    def take(self, table: Tensor, rows: Index) -> Tensor:
        taken = table.index_select(0, rows.on(table.device))
        return taken.index_select(1, self.kept.on(table.device)) if self.side else taken

    def put(self, table: Tensor, rows: Index, values: Tensor) -> None:
        if self.side:
            values = values.index_select(1, self.spread.on(table.device))
        table.index_copy_(0, rows.on(table.device), values)

    def pack(self, moves: Moves, buffer: str, at: int, name: Hashable, row: int) -> None:
        moves.add(buffer, at, [(name, row * self.numel, False)], self.numel, self.side, packed=True)

    def unpack(self, moves: Moves, name: Hashable, row: int, parts: list[tuple[Hashable, int, bool]]) -> None:
        moves.add(name, row * self.numel, parts, self.numel, self.side)


class _Direct:
    """What this process sends of one table, and where what it gets belongs."""

    def __init__(self, table: _Table, process: int, world: int) -> None:
        sent: list[list[int]] = [[] for _ in range(world)]
        self.received = [0] * world
        self.own, self.wanted = Index(), Index()
        sources: list[tuple[int, int, int]] = []  # (process, place among its parts, place in `wanted`)
        for slot in table.slots:
            if process in slot.held:
                for q in slot.wanted:
                    if q != process:
                        sent[q].append(slot.row)
            if process not in slot.wanted:
                continue
            for q in slot.held:
                if q == process:
                    sources.append((q, len(self.own), len(self.wanted)))
                    self.own.append(slot.row)
                else:
                    sources.append((q, self.received[q], len(self.wanted)))
                    self.received[q] += 1
            self.wanted.append(slot.row)
        self.sent = [len(rows) for rows in sent]
        self.rows = Index(row for rows in sent for row in rows)
        # Own parts come first, then those of each process.
        first = [0] * world
        for q in range(1, world):
            first[q] = first[q - 1] + self.received[q - 1]
        places = [place if q == process else len(self.own) + first[q] + place for q, place, _ in sources]
        self.rounds = [
            (Index(places[i] for i in positions), targets)
            for positions, targets in rounds([target for *_, target in sources])
        ]


class Transfer:
    """One collective's slots; the same in every process but for its own rows.

    Args:
        process, world: this process's index in the group, and that group's size.
    """

    def __init__(self, process: int, world: int) -> None:
        self.process, self.world = process, world
        self.tables: dict[Hashable, _Table] = {}
        self.sent_directly = 0  # elements, by all processes

    def add(
        self, name: Hashable, width: int, held: Processes, wanted: Processes, rows: Tensor, symmetric: bool = False
    ) -> None:
        """Slots of `width` elements in table `name`; `rows` of them here (any number where they do not concern it).

        Args:
            held, wanted: by which processes. symmetric: a slot is a symmetric matrix.
        """
        both = torch.minimum(held[1], wanted[1]) - torch.maximum(held[0], wanted[0]) + 1
        parts = (held[1] - held[0] + 1) * (wanted[1] - wanted[0] + 1) - both.clamp_min(0)
        shared = parts > 0
        if name not in self.tables:
            self.tables[name] = _Table(width, round(width**0.5) if symmetric else 0)
        table = self.tables[name]
        numbers = table.count + shared.cumsum(0) - 1
        mine = torch.zeros_like(shared)
        for first, last in (held, wanted):
            mine |= (first <= self.process) & (self.process <= last)
        columns = (t[mine & shared].tolist() for t in (rows, numbers, *held, *wanted))
        for row, number, first, last, wanted_first, wanted_last in zip(*columns, strict=True):
            table.slots.append(_Slot(row, number, range(first, last + 1), range(wanted_first, wanted_last + 1)))
        table.count += int(shared.sum())
        self.sent_directly += table.width * int(parts.sum())

    @property
    def numel(self) -> int:
        """Elements of all slots."""
        return sum(table.width * table.count for table in self.tables.values())

    @property
    def is_direct(self) -> bool:
        return self.sent_directly < 2 * (self.world - 1) * self.numel

    @cached_property
    def _routes(self) -> dict[Hashable, _Direct]:
        return {name: _Direct(table, self.process, self.world) for name, table in self.tables.items()}

    @cached_property
    def _places(self) -> dict[Hashable, tuple[Index, Index, Index, Index]]:
        """For an all-reduce: (rows held, their numbers, rows wanted, their numbers)."""
        found = {}
        for name, table in self.tables.items():
            held = [slot for slot in table.slots if self.process in slot.held]
            wanted = [slot for slot in table.slots if self.process in slot.wanted]
            found[name] = tuple(Index(t) for s in (held, wanted) for t in ([x.row for x in s], [x.number for x in s]))
        return found  # type: ignore[return-value]

    def __call__(self, tables: Mapping[Any, Tensor], group: Any, device: torch.device | None) -> None:
        """Puts the sums into the rows that want them, of tables (rows, width) that hold this process's parts.

        Args:
            group: the process group. device: on which it communicates; None: where the tables are.
        """
        if not self.numel:
            return
        if self.is_direct:
            sent = self.pack(tables)
            received = sent.new_empty(sum(self.received), device=device or sent.device)
            self.communicate({"sent": sent.to(received.device), "received": received}, group)
            self.unpack(tables, received.to(sent.device))
            return
        whole = []
        for name, table in self.tables.items():
            held, numbers, *_ = self._places[name]
            part = tables[name].new_zeros(table.count, table.width)
            whole.append(part.index_copy_(0, numbers.on(part.device), table.take(tables[name], held)).flatten())
        buffer = torch.cat(whole) if len(whole) > 1 else whole[0]
        there = buffer if device is None else buffer.to(device)
        self.communicate({"sent": there}, group)
        sizes = [part.numel() for part in whole]
        for (name, table), part in zip(self.tables.items(), there.to(buffer.device).split(sizes), strict=True):
            *_, wanted, numbers = self._places[name]
            values = part.view(-1, table.width).index_select(0, numbers.on(part.device))
            table.put(tables[name], wanted, values)

    # -- by kernels, between flat buffers ----------------------------------------------------------------------------

    @property
    def buffers(self) -> dict[str, int]:
        """Elements of the buffers that `communicate` needs, zeros."""
        return {"sent": sum(self.sent_to), "received": sum(self.received)} if self.is_direct else {"sent": self.numel}

    @cached_property
    def packing(self) -> tuple[Moves, Moves]:
        """From the tables into the buffer that is sent, and from what came into the tables, as `__call__` does it."""
        pack, unpack = Moves(), Moves()
        if not self.is_direct:
            first = 0
            for name, table in self.tables.items():
                held, numbers, wanted, targets = self._places[name]
                for row, number in zip(held, numbers, strict=True):
                    table.pack(pack, "sent", first + number * table.width, name, row)
                for row, number in zip(wanted, targets, strict=True):
                    table.unpack(unpack, name, row, [("sent", first + number * table.width, True)])
                first += table.count * table.width
            return pack, unpack
        sent = received = 0
        parts: dict[Hashable, list[tuple[Hashable, int, bool]]] = {}  # own ones first, then those of each process
        rows = {name: iter(self._routes[name].rows) for name in self.tables}
        for name in self.tables:
            parts[name] = [(name, row * self.tables[name].numel, False) for row in self._routes[name].own]
        for q in range(self.world):
            for name, table in self.tables.items():
                route = self._routes[name]
                for _ in range(route.sent[q]):
                    table.pack(pack, "sent", sent, name, next(rows[name]))
                    sent += table.width
                for _ in range(route.received[q]):
                    parts[name].append(("received", received, True))
                    received += table.width
        for name, table in self.tables.items():
            route = self._routes[name]
            sums: list[list[tuple[Hashable, int, bool]]] = [[] for _ in route.wanted]
            for positions, targets in route.rounds:
                for position, target in zip(positions, targets, strict=True):
                    sums[target].append(parts[name][position])
            for row, own in zip(route.wanted, sums, strict=True):
                table.unpack(unpack, name, row, own)
        return pack, unpack

    def communicate(self, buffers: Mapping[str, Tensor], group: Any) -> None:
        """The collective."""
        if self.is_direct:
            sizes = self.received, self.sent_to
            dist.all_to_all_single(buffers["received"], buffers["sent"], *sizes, group=group)
        else:
            dist.all_reduce(buffers["sent"], group=group)

    # -- direct -------------------------------------------------------------------------------------------------------

    @cached_property
    def sent_to(self) -> list[int]:
        """Elements for each process."""
        return self._elements("sent")

    @cached_property
    def received(self) -> list[int]:
        """Elements from each process."""
        return self._elements("received")

    def _elements(self, which: str) -> list[int]:
        return [
            sum(getattr(self._routes[name], which)[q] * table.width for name, table in self.tables.items())
            for q in range(self.world)
        ]

    def pack(self, tables: Mapping[Any, Tensor]) -> Tensor:
        """What this process sends, one process after the other, and for each one table after the other."""
        parts = [
            table.take(tables[name], self._routes[name].rows).split(self._routes[name].sent)
            for name, table in self.tables.items()
        ]
        return torch.cat([part.flatten() for of_process in zip(*parts, strict=True) for part in of_process])

    def unpack(self, tables: Mapping[Any, Tensor], received: Tensor) -> None:
        """Adds what came to this process's parts, in the order of processes."""
        names = list(self.tables)
        sizes = [self._routes[name].received[q] * self.tables[name].width for q in range(self.world) for name in names]
        pieces = received.split(sizes)
        for k, (name, table) in enumerate(self.tables.items()):
            route = self._routes[name]
            own = table.take(tables[name], route.own)
            parts = torch.cat([own, torch.cat(pieces[k :: len(names)]).view(-1, table.width)])
            sums = own.new_zeros(len(route.wanted), table.width)
            for positions, targets in route.rounds:
                sums.index_add_(0, targets.on(own.device), parts.index_select(0, positions.on(own.device)))
            table.put(tables[name], route.wanted, sums)
