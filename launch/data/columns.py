"""Columns of a data set, read as a whole or streamed: finding them, renaming them, refusing rows that lack a value."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset, Value

from launch.checks.errors import UserError

Rows = Dataset | IterableDataset
TEXTS = (Value("string"), Value("large_string"))  # types of columns with text


def column_names(rows: Rows) -> list[str]:
    """Names of the columns; a stream that does not know them is asked for its first row."""
    return list(rows.column_names or next(iter(rows)))


def shown(rows: Rows) -> str:
    """The columns' names, for messages."""
    return ", ".join(column_names(rows))


def choose_column(rows: Rows, wish: str | None, usual: tuple[str, ...], choose_with: str, flag: str) -> str:
    """The column called `wish`, or the first of the usual names that is there.

    Raises:
        UserError: there is none; names those that there are.
    """
    names = column_names(rows)
    if wish is not None and wish not in names:
        raise UserError(f"{choose_with} {wish}: {flag} has no such column. It has: {shown(rows)}.")
    found = wish or next((name for name in usual if name in names), None)
    if found is None:
        raise UserError(
            f"{flag} has no usable columns. It has: {shown(rows)}. Usable are: {', '.join(usual)}; or name one with "
            f"{choose_with}."
        )
    return found


def refuse_missing(rows: Rows, columns: tuple[str, ...], flag: str) -> Rows:
    """`rows`, each of which has a value in `columns`; a stream's are looked at when they are read.

    Raises:
        UserError: naming the first row without one, and how many there are where that is known.
    """
    if isinstance(rows, IterableDataset):
        return rows.map(partial(_refuse_row, columns=columns, flag=flag), with_indices=True)
    for name in columns:
        empty = [number for number, value in enumerate(rows[name]) if _missing(value)]
        if empty:
            raise UserError(
                f"{flag}: column {name!r} is empty in {len(empty)} of {len(rows)} rows, the first of them row "
                f"{empty[0]} (counted from 0). Fill or remove these rows."
            )
    return rows


def _refuse_row(row: dict[str, Any], number: int, columns: tuple[str, ...], flag: str) -> dict[str, Any]:
    for name in columns:
        if _missing(row[name]):
            raise UserError(f"{flag}: column {name!r} is empty in row {number} (counted from 0). Fill or remove it.")
    return row


def _missing(value: Any) -> bool:
    return value is None or value == [] or value == ""
