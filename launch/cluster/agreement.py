"""Whether all processes read the same data: compared once, before a model is loaded.

Hosts with copies of their own may hold a stale one. Ranks with fewer rows end an epoch earlier and leave the others in
a collective; ranks with other rows train on a mixture that nobody asked for.
"""

from __future__ import annotations

import hashlib
import socket
from itertools import islice
from typing import Any

import torch.distributed as dist
from datasets import Dataset, IterableDataset

from launch.checks.errors import UserError

MAX_ROWS = 1 << 16  # that are compared; of more, evenly spaced ones
MAX_BYTES = 1 << 28
STREAMED_ROWS = 8
BATCH = 1000


def check_same_data(data: dict[str, Any]) -> None:
    """Compares all processes' data sets, by number of rows and content. A collective call.

    Communication: one all-gather of some 100 bytes per process.

    Args:
        data: {flag: rows}; rows: a `Dataset`, an `IterableDataset` (its first rows are read), or None.

    Raises:
        UserError: on every rank, naming those whose rows differ from rank 0's.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = {flag: fingerprint(rows) for flag, rows in data.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), mine))
    for flag in mine:
        (first_host, first), *others = [(host, found[flag]) for host, found in gathered]
        different = [
            f"rank {rank} on {host} has {_described(found, first)}"
            for rank, (host, found) in enumerate(others, 1)
            if found != first
        ]
        if different:
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise UserError(
                f"{flag}: not all processes read the same rows. Rank 0 on {first_host} has {first[0]} rows; "
                f"{', '.join(different[:4])}{more}. Bring the copies on all hosts to one state, or use a shared folder."
            )


def fingerprint(rows: Dataset | IterableDataset | None) -> tuple[int | str, str]:
    """(number of rows, digest of their content); of pictures and sounds in files of their own, the other columns."""
    digest = hashlib.blake2b(digest_size=16)
    if rows is None:
        return 0, ""
    if not isinstance(rows, Dataset):
        for row in islice(rows, STREAMED_ROWS):
            digest.update(repr(row).encode(errors="replace"))
        return "streamed", digest.hexdigest()
    digest.update(repr(sorted(rows.column_names)).encode())
    count = min(MAX_ROWS, max(1, MAX_BYTES * len(rows.data) // max(rows.data.nbytes, 1)))
    stride = max(1, -(-len(rows) // count))
    sample = rows if stride == 1 else rows.select(range(0, len(rows), stride))
    for batch in sample.with_format("arrow").iter(BATCH):
        for row in batch.select(sorted(batch.column_names)).to_pylist():
            digest.update(repr(_without_paths(row)).encode(errors="replace"))
    return len(rows), digest.hexdigest()


def _without_paths(value: Any) -> Any:
    """A row without the folders of its pictures, which may differ from host to host."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return value["bytes"]
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return value


def _described(found: tuple[Any, str], first: tuple[Any, str]) -> str:
    return f"{found[0]} rows" if found[0] != first[0] else f"{found[0]} rows with other content"
