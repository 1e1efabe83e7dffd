"""Rows of local text files: `.jsonl`, `.json`, `.csv` and `.txt`, one after the other, each with its place.

A row is kept as the JSON text of its values until it is converted, beside the file and line that it is from. So every
complaint names both, and every value is what the file says. datasets' own readers guess one type per column: in a
column of texts and numbers (datasets 5.2) the text "1e3" comes back as 1000.0 and "null" as None; a column whose first
10 MB are null, a null row (SIGSEGV in pyarrow 26) or a second file with other columns cannot be read at all.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from launch.checks.errors import UserError

PLACE, ROW = "place", "row"
FEATURES = Features({PLACE: Value("string"), ROW: Value("large_string")})
READERS = (".jsonl", ".json", ".csv", ".txt")
# One row of this many characters takes a minute to tokenise; rows are cut at --max_length tokens anyway.
MAX_CHARACTERS = 2_000_000
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_files(files: list[Path], flag: str, streaming: bool) -> Dataset | IterableDataset:
    """All rows of `files` in the columns `PLACE` and `ROW`.

    Raises:
        UserError: a file that is empty, not UTF-8 (names the byte) or not of its kind (names the line). A stream's
            rows are looked at when they are read.
    """
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{flag} {file} is empty.")
    # datasets keeps what it has read under a hash of these arguments: size and date tell versions of a file apart.
    stamps = [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    given = {"files": [str(file.absolute()) for file in files], "stamps": stamps, "flag": [flag] * len(files)}
    if streaming:
        return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs=given)
    try:
        return Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=given)
    except Exception as error:  # datasets wraps what a generator raises
        raise user_error(error, f"{flag} {files[0] if len(files) == 1 else files[0].parent}") from error


def user_error(error: BaseException, what: str) -> UserError:
    """The `UserError` among the causes of `error`, or one that says that `what` could not be read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        error, cause = cause, cause.__cause__
    lines = str(error).strip().splitlines()
    return UserError(f"{what} could not be read: {type(error).__name__}: {lines[0] if lines else ''}")


def _rows(files: list[str], stamps: list[str], flag: list[str]) -> Iterator[dict[str, str]]:
    for name, said in zip(files, flag, strict=True):
        file = Path(name)
        reader = {".csv": _csv_rows, ".txt": _paragraphs, ".json": _json_rows}.get(file.suffix, _json_lines)
        for number, row in reader(file, said):
            place = f"{file}, line {number}" if file.suffix != ".json" else f"{file}, row {number} (counted from 1)"
            text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
            _check_row(text, f"{said}: {place}")
            yield {PLACE: place, ROW: text}


def _check_row(text: str, where: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where}: the row has {len(text):,} characters, more than {MAX_CHARACTERS:,}. Cut it, or split it into "
            "several rows."
        )
    try:
        values = json.loads(text)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half of a surrogate pair, which no text can hold: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: the row is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{where} could not be read: it is not JSON: {error}") from error
    if not isinstance(values, dict):
        kind = "null" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{where}: the row is {kind}, not an object {{...}} of columns; remove or mend it.")


def _lines(file: Path, flag: str) -> Iterator[str]:
    """Lines of a text file in UTF-8, with their ends."""
    position = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith(BYTE_ORDER_MARKS):
                raise UserError(f"{flag} {file} could not be read: it is UTF-16 (byte 0). Convert it to UTF-8.")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{flag} {file} could not be read: byte {position + error.start} (line {number}) is "
                    f"{line[error.start : error.start + 1]!r}, which is not UTF-8. Convert the file, such as with "
                    f"`iconv -f latin1 -t utf-8`."
                ) from error
            position += len(line)


def _json_lines(file: Path, flag: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(file, flag), 1):
        if line.strip():
            yield number, line.strip()


def _json_rows(file: Path, flag: str) -> Iterator[tuple[int, Any]]:
    """A list of rows; or, as `Dataset.to_json` writes them, one row per line."""
    lines = list(_lines(file, flag))
    first = next((line.lstrip() for line in lines if line.strip()), "")
    if not first.startswith("["):
        yield from ((number, line) for number, line in enumerate(filter(str.strip, lines), 1))
        return
    try:
        rows = json.loads("".join(lines))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {file} could not be read: it is not JSON: {error}") from error
    yield from enumerate(rows, 1)


def _csv_rows(file: Path, flag: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Every value as the text that the file has: 007 keeps its zeros, and NA is no missing value."""
    csv.field_size_limit(MAX_CHARACTERS)
    reader = csv.DictReader(_lines(file, flag), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{flag} {file}, line {reader.line_num} could not be read: it has another number of values than "
                    f"the header, which has {len(reader.fieldnames or ())}."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{flag} {file}, line {reader.line_num} could not be read: {error}.") from error


def _paragraphs(file: Path, flag: str) -> Iterator[tuple[int, dict[str, str]]]:
    """A text file's rows are its paragraphs: lines would lack what stands before them."""
    start, lines = 1, []
    for number, line in enumerate(_lines(file, flag), 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, {"text": "".join(lines).rstrip("\n")}
            lines = []
    if lines:
        yield start, {"text": "".join(lines)}
