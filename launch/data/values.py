"""Values of rows, whatever their column's type: texts, labels, conversations; and finding columns."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from launch.checks.errors import UserError, say
from launch.data.files import MAX_CHARACTERS, PLACE, ROW, parse_row

Rows = Dataset | IterableDataset
Row = dict[str, Any]
SAMPLE = 100  # rows whose keys are the columns of a data set in JSON
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
         "model": "assistant", "observation": "tool", "function_response": "tool"}  # fmt: skip
WORDED = ("role", "content")


class LeftOut:
    """Says in one line what a data set has and the run does not use, when it is met first."""

    def __init__(self, flag: str) -> None:
        self.flag, self.said = flag, set()

    def add(self, what: str, names: Iterable[str]) -> None:
        new = {(what, name) for name in names} - self.said
        if new:
            say(f"{self.flag}: {what}: {', '.join(sorted(name or '(without a name)' for _, name in new))}.")
        self.said |= new

    def add_columns(self, row: Row, read: Collection[str | None]) -> None:
        """Columns in which `row` has a value that the run does not read."""
        self.add("columns that are not read", (k for k, v in row.items() if k not in read and not missing(v)))


def user_error(error: BaseException, what: str) -> UserError:
    """The `UserError` among the causes of `error`, or one that says that `what` could not be read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        error, cause = cause, cause.__cause__
    lines = str(error).strip().splitlines()
    return UserError(f"{what} could not be read: {type(error).__name__}: {lines[0] if lines else ''}")


def column_names(rows: Rows) -> list[str]:
    """Names of the columns: those of the first 100 rows where every row has its own."""
    names = list(rows.column_names or next(iter(rows)))
    if ROW not in names:
        return names
    return list(dict.fromkeys(name for row in islice(rows, SAMPLE) for name in parse_row(row[ROW], row[PLACE])))


def read_batch(batch: dict[str, list[Any]], numbers: list[int], flag: str) -> Iterator[tuple[str, Row]]:
    """Every row of a batch with its place, for messages."""
    if ROW in batch:
        for place, row in zip(batch[PLACE], batch[ROW], strict=True):
            yield f"{flag}: {place}", parse_row(row, f"{flag}: {place}")
        return
    for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True):
        yield f"{flag}: row {number} (counted from 0)", dict(zip(batch, values, strict=True))


def first_row(rows: Rows, flag: str) -> Row:
    """The first row, whatever file it is from."""
    return next(read_batch({name: [value] for name, value in next(iter(rows)).items()}, [0], flag))[1]


def choose_column(rows: Rows, wish: str | None, usual: tuple[str, ...], choose_with: str, flag: str) -> str:
    """The column called `wish`, or the first of the usual names that is there."""
    names = column_names(rows)
    if wish is not None and wish not in names:
        raise UserError(f"{choose_with} {wish}: {flag} has no such column. It has: {', '.join(names)}.")
    found = wish or next((name for name in usual if name in names), None)
    if found is None:
        raise UserError(
            f"{flag} has no usable columns. It has: {', '.join(names)}. Usable are: {', '.join(usual)}; or name one "
            f"with {choose_with}."
        )
    return found


def missing(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, an empty list, not a number. One rule for every layout."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def text_of(row: Row, column: str, where: str, optional: bool = False) -> str:
    """The text in a column: text as it is, a number or a truth value as JSON writes it; "" for one that is optional."""
    value = row.get(column)
    if missing(value):
        if optional:
            return ""
        raise UserError(f"{where}: column {column!r} is empty. Fill or remove this row.")
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise UserError(
                f"{where}: column {column!r} has {len(value):,} characters, more than {MAX_CHARACTERS:,}. Cut it, or "
                "split it into several rows."
            )
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UserError(f"{where}: column {column!r} holds a {type(value).__name__}, not text: {str(value)[:100]}.")


def conversation_of(row: Row, column: str, where: str, pictures: bool = False) -> list[Row]:
    """The messages in a column as `role` and `content` with whatever else they hold; ShareGPT's spelling is read, too.

    Content in parts is joined. A function call becomes a tool call, its arguments an object.

    Args:
        pictures: parts may be pictures, which are in a column of their own.
    """
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded(value, f"{where}: column {column!r}")
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        # datasets' `Sequence` of messages: a list per key.
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if missing(value):
        raise UserError(f"{where}: column {column!r} is empty. Fill or remove this row.")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f'{where}: column {column!r} is no list of messages, {{"role": ..., "content": ...}}.')
    return [_message(message, f"{where}, message {number}", pictures) for number, message in enumerate(value, 1)]


def _message(message: Row, where: str, pictures: bool) -> Row:
    made = {key: value for key, value in message.items() if value is not None}
    if "role" not in made and "from" in made:
        made = {"role": made.pop("from"), "content": made.pop("value", None), **made}
    role = made.get("role")
    if not isinstance(role, str) or not role:
        raise UserError(f'{where}: it has no role, {{"role": ..., "content": ...}}: {str(message)[:100]}.')
    made["role"] = ROLES.get(role, role)
    if role == "function_call":  # LLaMA-Factory: the call stands in the text
        made |= {"role": "assistant", "content": "", "function_call": decoded(made.get("content"), where)}
    if "function_call" in made:  # OpenAI's older name
        made["tool_calls"] = [{"type": "function", "function": made.pop("function_call")}]
    if made.get("tool_calls"):
        made["tool_calls"] = [_tool_call(call, where) for call in decoded(made["tool_calls"], where)]
    else:
        made.pop("tool_calls", None)
    content = made.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        made["content"] = "".join(_part(part, where, pictures) for part in content)
    may_be_empty = "tool_calls" in made or made["role"] in ("tool", "function", "system", "developer")
    made["content"] = text_of(made, "content", where, optional=may_be_empty)
    if made.get("weight", 1) not in (0, 1):
        raise UserError(f"{where}: weight {made['weight']!r} must be 0 (not trained) or 1.")
    return made


def _part(part: Row, where: str, pictures: bool) -> str:
    if pictures and part.get("type") == "image":
        return ""
    if not isinstance(part.get("text"), str):
        raise UserError(f"{where}: a part of the content is no text: {str(part)[:100]}.")
    return part["text"]


def _tool_call(call: Any, where: str) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call has no function with a name: {str(call)[:100]}.")
    more = call if "function" in call else {}
    arguments = decoded(function.get("arguments") or {}, where)
    return {"type": "function", **more, "function": {**function, "arguments": arguments}}


def decoded(value: Any, where: str) -> Any:
    """A value that some store as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, {value[:100]!r}, is not JSON: {error}.") from error
