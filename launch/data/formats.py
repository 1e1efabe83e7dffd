"""From rows as people store them to the columns a trainer reads.

causal-lm: `prompt` and `completion` (`launch.data.causal_formats`). sequence-classification: `text` and `labels`.
"""

from __future__ import annotations

import re
from typing import Any

from datasets import ClassLabel, Dataset, Value

from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.causal_formats import causal_rows as causal_rows
from launch.data.columns import TEXTS, refuse_missing
from launch.data.columns import choose_column as choose_column

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
# What the config of a model with --regression must know.
REGRESSION: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}


def classification_texts(rows: Dataset, run: DataArguments, flag: str) -> Dataset:
    """`rows` as `text` (and `text_pair`, if there are two) and `label`, the label still as stored.

    Raises:
        UserError: no text or label column, a missing value, or a text that `--text_pattern` does not match.
    """
    text, pair = _text_columns(rows, run, flag)
    label = choose_column(rows, run.label_column, LABEL_COLUMNS, "--label_column", flag)
    texts = (text, pair) if pair else (text,)
    for name in texts:
        if rows.features[name] not in TEXTS:
            raise UserError(
                f"{flag}: column {name!r} holds {rows.features[name]}, not text. Choose with --text_column."
            )
    refuse_missing(rows, (*texts, label), flag)
    pattern = _compile(run.text_pattern)
    # Alpaca rows keep part of the text in a second column; a column chosen by name is taken alone.
    alpaca = run.text_column is None and pair is None and text == "instruction"
    second = "input" if alpaca and "input" in rows.column_names else None

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        joined = f"{row[text]}\n{row[second]}" if second and row[second] else row[text]
        if pattern is not None:
            match = pattern.search(joined)
            if match is None:
                raise UserError(f"{flag}: --text_pattern {run.text_pattern!r} does not match {joined[:200]!r}.")
            joined = match.group(1)
        return {"text": joined, **({"text_pair": row[pair]} if pair else {}), "label": row[label]}

    plain = rows.remove_columns([c for c in rows.column_names if c not in (text, pair, label, second)])
    names = rows.features[label].names if isinstance(rows.features[label], ClassLabel) else None
    kept = ("text", "text_pair", "label")
    made = plain.map(convert, remove_columns=[c for c in plain.column_names if c not in kept])
    return made.cast_column("label", ClassLabel(names=names)) if names else made


def _text_columns(rows: Dataset, run: DataArguments, flag: str) -> tuple[str, str | None]:
    """The column of the text, and that of the second text if there are two."""
    if run.text_pair_column is not None:
        if run.text_column is None:
            raise UserError(f"--text_pair_column {run.text_pair_column} needs --text_column, the first of the two.")
        first = choose_column(rows, run.text_column, (), "--text_column", flag)
        return first, choose_column(rows, run.text_pair_column, (), "--text_pair_column", flag)
    if run.text_column is None and run.text_pattern is None and "instruction" not in rows.column_names:
        for first, second in TEXT_PAIRS:
            if first in rows.column_names and second in rows.column_names:
                return first, second
    return choose_column(rows, run.text_column, TEXT_COLUMNS, "--text_column", flag), None


def label_names(rows: Dataset, flag: str) -> list[str]:
    """Names of the classes, in the order of their ids.

    Raises:
        UserError: fewer than two classes, or labels that are no classes (floating point numbers, lists).
    """
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    if getattr(feature, "dtype", "list").startswith(("float", "double", "list")):
        raise UserError(
            f"{flag}: labels of type {feature} are no classes; use text, whole numbers or booleans, or --regression."
        )
    # Sorted as numbers where they are numbers: "10" comes after "9".
    names = [str(value) for value in sorted(set(rows["label"]))]
    if len(names) < 2:
        raise UserError(f"{flag}: every row has the label {names[0]!r}; classification needs at least two classes.")
    return names


def number_labels(rows: Dataset, names: list[str], flag: str) -> Dataset:
    """Replaces `label` by `labels`, the position in `names`.

    Raises:
        UserError: a label that the training data does not have.
    """
    feature = rows.features["label"]
    stored = [feature.int2str(v) if isinstance(feature, ClassLabel) else str(v) for v in rows["label"]]
    unknown = sorted(set(stored) - set(names))
    if unknown:
        raise UserError(f"{flag} has labels that the training data lacks: {', '.join(unknown)}. Known: {names}.")
    ids = {name: number for number, name in enumerate(names)}
    return rows.remove_columns("label").add_column("labels", [ids[name] for name in stored])


def number_targets(rows: Dataset, flag: str) -> Dataset:
    """Replaces `label` by `labels`, float32: the numbers that a model with one output learns.

    Raises:
        UserError: labels that are no numbers.
    """
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel) or not getattr(feature, "dtype", "").startswith(("float", "double", "int")):
        raise UserError(f"{flag}: labels of type {feature} are no numbers, which --regression needs.")
    return rows.cast_column("label", Value("float32")).rename_column("label", "labels")


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
