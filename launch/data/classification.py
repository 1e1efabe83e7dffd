"""Classification and regression: texts, pairs of texts, and labels."""

from __future__ import annotations

import math
import re
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.values import LeftOut, Row, choose_column, column_names, missing, read_batch, text_of, user_error

TEXT_COLUMNS = ("instruction", "text", "sentence", "question")
# Two texts that belong together, as GLUE's and BoolQ's files have them; the model reads both.
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
)
LABEL_COLUMNS = ("label", "answer")
LABELS_OF_PICTURES = (*LABEL_COLUMNS, "fine_label")


def classification_texts(rows: Dataset, run: DataArguments, flag: str, regression: bool = False) -> Dataset:
    """`rows` as `text` (and `text_pair`, if there are two) and `label`: a class's name, or a number."""
    text, pair = _text_columns(rows, run, flag)
    label = choose_column(rows, run.label_column, LABEL_COLUMNS, "--label_column", flag)
    pattern = _compile(run.text_pattern)
    # Alpaca rows keep part of the text in a second column; a column chosen by name is taken alone.
    alpaca = run.text_column is None and pair is None and text == "instruction"
    second = "input" if alpaca and "input" in column_names(rows) else None
    names, left_out = class_names(rows, run), LeftOut(flag)

    def convert(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        made = []
        for where, row in read_batch(batch, numbers, flag):
            left_out.add_columns(row, (text, pair, second, label))
            joined = text_of(row, text, where)
            if second and (more := text_of(row, second, where, optional=True)):
                joined = f"{joined}\n{more}"
            if pattern is not None:
                match = pattern.search(joined)
                if match is None:
                    raise UserError(f"{where}: --text_pattern {run.text_pattern!r} does not match {joined[:200]!r}.")
                joined = match.group(1)
            second_text = text_of(row, pair, where) if pair else None
            target = label_of(row, label, where, names, regression)
            made.append({"text": joined, "text_pair": second_text, "label": target})
        return {name: [row[name] for row in made] for name in features}

    features = {name: Value("string") for name in (("text", "text_pair") if pair else ("text",))}
    features["label"] = Value("float32" if regression else "string")
    how = {"batched": True, "with_indices": True, "load_from_cache_file": False}  # what is left out is said every time
    try:
        return rows.map(convert, remove_columns=rows.column_names, features=Features(features), **how)
    except Exception as error:
        raise user_error(error, flag) from error


def class_names(rows: Dataset, run: DataArguments) -> list[str] | None:
    """Names of the classes where the data set itself numbers them."""
    label = run.label_column or next((name for name in LABELS_OF_PICTURES if name in rows.column_names), None)
    feature = (rows.features or {}).get(label)
    return feature.names if isinstance(feature, ClassLabel) else None


def class_options(names: list[str]) -> dict[str, Any]:
    """What the config of a model must know of its classes; [] for numbers (--regression)."""
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    ids = dict(enumerate(names))
    labels = {"id2label": ids, "label2id": {name: number for number, name in ids.items()}}
    return {"num_labels": len(names), "problem_type": "single_label_classification", **labels}


def label_of(row: Row, column: str, where: str, names: list[str] | None, regression: bool) -> Any:
    """A label: the name of a class, or with `regression` a finite number."""
    value = row.get(column)
    # -1 is how data sets of the hub mark rows whose label is kept secret.
    if missing(value) or (names is not None and value == -1):
        raise UserError(f"{where}: column {column!r} is empty. Fill or remove this row.")
    if regression:
        try:
            number = float(value) if names is None else math.nan
        except (ValueError, TypeError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{where}: label {value!r} is no finite number, which --regression needs.")
        return number
    if names is not None:
        return names[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise UserError(
            f"{where}: label {str(value)[:100]} is no class; use text, whole numbers or booleans, or --regression."
        )
    return str(value).strip()


def label_names(rows: Dataset, flag: str, names: list[str] | None = None) -> list[str]:
    """Names of the classes, in the order of their ids: that of the data set, of numbers, or the alphabet's."""
    if names is not None:
        return names
    found = set(rows["label"])
    if len(found) < 2:
        raise UserError(f"{flag}: every row has the label {found.pop()!r}; classification needs at least two classes.")
    are_numbers = all(re.fullmatch(r"[+-]?\d+", name) for name in found)
    return sorted(found, key=int if are_numbers else str)  # "10" comes after "9"


def number_labels(rows: Dataset, names: list[str], flag: str) -> Dataset:
    """Replaces `label` by `labels`, the position in `names`; [] leaves numbers as they are."""
    if not names:
        return rows.rename_column("label", "labels")
    unknown = sorted(set(rows["label"]) - set(names))
    if unknown:
        raise UserError(f"{flag} has labels that the training data lacks: {', '.join(unknown)}. Known: {names}.")
    return rows.rename_column("label", "labels").cast_column("labels", ClassLabel(names=names))


def _text_columns(rows: Dataset, run: DataArguments, flag: str) -> tuple[str, str | None]:
    """The column of the text, and that of the second text if there are two."""
    names = column_names(rows)
    if run.text_pair_column is not None:
        if run.text_column is None:
            raise UserError(f"--text_pair_column {run.text_pair_column} needs --text_column, the first of the two.")
        first = choose_column(rows, run.text_column, (), "--text_column", flag)
        return first, choose_column(rows, run.text_pair_column, (), "--text_pair_column", flag)
    if run.text_column is None and run.text_pattern is None and "instruction" not in names:
        for first, second in TEXT_PAIRS:
            if first in names and second in names:
                return first, second
    return choose_column(rows, run.text_column, TEXT_COLUMNS, "--text_column", flag), None


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"--text_pattern {pattern!r} is no regular expression: {error}.") from error
    if compiled.groups < 1:
        raise UserError(f"--text_pattern {pattern!r} has no group; put the part to keep in parentheses.")
    return compiled
