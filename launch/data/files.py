"""Rows of local text files: `.jsonl`, `.json`, `.csv` and `.txt`, one after the other, each with its place.

A row is kept as the JSON text of its values until it is converted, beside the file and line that it is from. So every
complaint names both, and every value is what the file says. datasets' own readers guess one type per column: in a
column of texts and numbers (datasets 5.2) the text "1e3" comes back as 1000.0 and "null" as None; a column whose first
10 MB are null, a null row (SIGSEGV in pyarrow 26) or a second file with other columns cannot be read at all.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from launch.checks.errors import UserError

PLACE, ROW = "place", "row"
FEATURES = Features({PLACE: Value("string"), ROW: Value("large_string")})
# One row of this many characters takes a minute to tokenise; rows are cut at --max_length tokens anyway.
MAX_CHARACTERS = 2_000_000
PlacedRows = Iterator[tuple[str, str]]  # where a row stands in its file, and its JSON text


def read_files(files: list[Path], flag: str, streaming: bool) -> Dataset | IterableDataset:
    """All rows of `files` in the columns `PLACE` and `ROW`; a stream's are read when they are asked for."""
    # datasets keeps what it has read under a hash of these arguments: size and date tell versions of a file apart.
    stamped = [(str(file.absolute()), f"{file.stat().st_size} {file.stat().st_mtime_ns}") for file in files]
    if next(_rows(stamped, flag), None) is None:
        raise UserError(f"{flag} {files[0] if len(files) == 1 else files[0].parent} is empty.")
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(_rows, features=FEATURES, gen_kwargs={"files": stamped, "flag": flag})


def parse_row(text: str, where: str) -> dict[str, Any]:
    """The values of a row by column."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where}: the row has {len(text):,} characters, more than {MAX_CHARACTERS:,}. Cut it, or split it into "
            "several rows."
        )
    try:
        values = json.loads(text)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: the row cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        kind = "null" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{where}: the row is {kind}, not an object {{...}} of columns; remove or mend it.")
    return values


def _rows(files: list[tuple[str, str]], flag: str) -> Iterator[dict[str, str]]:
    for file, _ in files:
        try:
            for place, row in READERS[Path(file).suffix](_lines(file)):
                yield {PLACE: f"{file}, {place}", ROW: row}
        except (ValueError, RecursionError, csv.Error) as error:
            raise UserError(f"{flag} {file} could not be read: {error}") from error


def _lines(file: str) -> Iterator[str]:
    """Lines of a text file in UTF-8, with their ends."""
    position = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                wide = position == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff"))  # as PowerShell writes
                guess = "utf-16" if wide else "latin1"
                raise ValueError(
                    f"byte {position + error.start} (line {number}) is {line[error.start : error.start + 1]!r}, which "
                    f"is not UTF-8. Convert the file, such as with `iconv -f {guess} -t utf-8`."
                ) from error
            position += len(line)


def _json_lines(lines: Iterator[str]) -> PlacedRows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", line.strip()


def _json_rows(lines: Iterator[str]) -> PlacedRows:
    """A list of rows; or, as `Dataset.to_json` writes them, one row per line."""
    found = list(lines)
    if not next(filter(str.strip, found), "").lstrip().startswith("["):
        yield from _json_lines(iter(found))
        return
    for number, row in enumerate(json.loads("".join(found)), 1):
        yield f"row {number} (counted from 1)", json.dumps(row)


def _csv_rows(lines: Iterator[str]) -> PlacedRows:
    """Every value as the text that the file has: 007 keeps its zeros, and NA is no missing value."""
    csv.field_size_limit(MAX_CHARACTERS)
    reader = csv.DictReader(lines, strict=True)
    names = reader.fieldnames or ()
    for name in (name for number, name in enumerate(names) if name and name in names[:number]):
        raise ValueError(f"line {reader.line_num} names the column {name!r} twice; remove or rename one.")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"line {reader.line_num} has another number of values than the header, which has {len(names)}."
            )
        yield f"line {reader.line_num}", json.dumps(row)


def _paragraphs(lines: Iterator[str]) -> PlacedRows:
    """A text file's rows are its paragraphs: lines would lack what stands before them."""
    start, paragraph = 1, ""
    for number, line in enumerate(lines, 1):
        if line.strip():
            start = start if paragraph else number
            paragraph += line
        elif paragraph:
            yield f"line {start}", json.dumps({"text": paragraph.rstrip("\n")})
            paragraph = ""
    if paragraph:
        yield f"line {start}", json.dumps({"text": paragraph})


READERS: dict[str, Callable[[Iterator[str]], PlacedRows]] = {
    ".jsonl": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".txt": _paragraphs,
}
