"""From rows as people store them to the columns a trainer reads.

causal-lm: `prompt` and `completion`, as text or as chat messages; TRL tokenises them, appends the end-of-sequence token
and masks the prompt. sequence-classification: `text` and `labels`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from datasets import ClassLabel, Dataset, Value

from launch.errors import UserError
from launch.flags import RunArguments

# The wording of Stanford Alpaca (Taori et al., 2023), which most instruction data sets were made for.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
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
TEXTS = (Value("string"), Value("large_string"))
USABLE = "instruction + output (and input), prompt + completion, or messages"


def causal_rows(rows: Dataset, run: RunArguments, flag: str, has_chat_template: bool) -> Dataset:
    """`rows` as prompt and completion.

    A conversation becomes one row per answer of the assistant, with everything before it as the prompt: the loss then
    covers each answer once, whatever the chat template.

    Raises:
        UserError: no usable columns, a row with a missing value, or messages without a chat template.
    """
    rows = _renamed(rows, run, flag)
    columns = set(rows.column_names)
    if {"prompt", "completion"} <= columns:
        convert, needed = _keep_pairs, ("prompt", "completion")
        chat = not isinstance(rows[0]["prompt"], str)
    elif "messages" in columns:
        convert, needed, chat = _split_messages, ("messages",), True
    elif {"instruction", "output"} <= columns:
        chat = run.prompt_template == "chat"
        convert, needed = _alpaca(run.prompt_template), ("instruction", "output")
    else:
        raise UserError(f"{flag} has no usable columns. It has: {_names(rows)}. Usable are: {USABLE}.")
    if chat and not has_chat_template:
        raise UserError(
            f"{flag} needs a chat template ({'--prompt_template chat' if 'messages' not in columns else 'messages'}), "
            "and this model's tokenizer has none. Pass --chat_template_path, or data with prompt and completion."
        )
    _refuse_missing(rows, needed, flag)
    _refuse_other_types(rows, needed, flag)
    try:
        made = rows.map(convert, batched=True, remove_columns=rows.column_names, desc="Building prompts")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if len(made) == 0:
        raise UserError(f"{flag}: no conversation has an answer by the assistant.")
    return made


def _renamed(rows: Dataset, run: RunArguments, flag: str) -> Dataset:
    """`rows` with the columns that flags name called instruction, input and output, and no others."""
    wishes = {"instruction": run.instruction_column, "input": run.input_column, "output": run.output_column}
    named = {
        choose_column(rows, old, (), f"--{new}_column", flag): new for new, old in wishes.items() if old is not None
    }
    if not named:
        return rows
    missing = {"instruction", "output"} - set(named.values())
    if missing:
        raise UserError(f"--{'_column, --'.join(sorted(named.values()))}_column need --{missing.pop()}_column as well.")
    return rows.select_columns(list(named)).rename_columns({old: new for old, new in named.items() if old != new})


def _keep_pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"prompt": batch["prompt"], "completion": batch["completion"]}


def _split_messages(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    prompts, completions = [], []
    for messages in batch["messages"]:
        for position, message in enumerate(messages):
            if message.get("role") == "assistant" and position > 0:
                prompts.append(messages[:position])
                completions.append([message])
    return {"prompt": prompts, "completion": completions}


def _alpaca(template: str) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        inputs = batch.get("input") or [""] * len(batch["instruction"])
        prompts = [_prompt(template, i, x or "") for i, x in zip(batch["instruction"], inputs, strict=True)]
        if template != "chat":
            return {"prompt": prompts, "completion": batch["output"]}
        return {
            "prompt": [[{"role": "user", "content": p}] for p in prompts],
            "completion": [[{"role": "assistant", "content": o}] for o in batch["output"]],
        }

    return convert


def _prompt(template: str, instruction: str, context: str) -> str:
    if template == "alpaca":
        wording = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
        return wording.format(instruction=instruction, input=context)
    text = f"{instruction}\n{context}" if context else instruction
    return text if template == "chat" else f"{text}\n"


def classification_texts(rows: Dataset, run: RunArguments, flag: str) -> Dataset:
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
    _refuse_missing(rows, (*texts, label), flag)
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


def _text_columns(rows: Dataset, run: RunArguments, flag: str) -> tuple[str, str | None]:
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
        raise UserError(f"{flag}: labels of type {feature} are no classes; use text, whole numbers or booleans.")
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


def choose_column(rows: Dataset, wish: str | None, usual: tuple[str, ...], choose_with: str, flag: str) -> str:
    """The column called `wish`, or the first of the usual names that is there.

    Raises:
        UserError: there is none; names those that there are.
    """
    if wish is not None and wish not in rows.column_names:
        raise UserError(f"{choose_with} {wish}: {flag} has no such column. It has: {_names(rows)}.")
    found = wish or next((name for name in usual if name in rows.column_names), None)
    if found is None:
        raise UserError(
            f"{flag} has no usable columns. It has: {_names(rows)}. Usable are: {', '.join(usual)}; or name one with "
            f"{choose_with}."
        )
    return found


def _refuse_missing(rows: Dataset, columns: tuple[str, ...], flag: str) -> None:
    for name in columns:
        empty = [number for number, value in enumerate(rows[name]) if value is None or value == [] or value == ""]
        if empty:
            raise UserError(
                f"{flag}: column {name!r} is empty in {len(empty)} of {len(rows)} rows, the first of them row "
                f"{empty[0]} (counted from 0). Fill or remove these rows."
            )


def _refuse_other_types(rows: Dataset, columns: tuple[str, ...], flag: str) -> None:
    """Raises unless the columns of a causal-lm row hold text, or all of them lists of {"role", "content"}."""
    optional = ("input",) if "instruction" in columns and "input" in rows.column_names else ()
    for name in (*columns, *optional):
        feature = rows.features[name]
        message = getattr(feature, "feature", None) if columns != ("instruction", "output") else None
        if isinstance(message, dict) and {"role", "content"} <= set(message):
            continue
        if "messages" in columns:
            raise UserError(f'{flag}: column {name!r} holds {feature}, not lists of {{"role": ..., "content": ...}}.')
        if feature not in TEXTS and not (name in optional and feature == Value("null")):
            raise UserError(f"{flag}: column {name!r} holds {feature}, not text. Write the values as strings.")
    if len({rows.features[name] in TEXTS for name in columns}) > 1:
        raise UserError(f"{flag}: of {' and '.join(columns)}, one holds text and one messages; make both the same.")


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


def _names(rows: Dataset) -> str:
    return ", ".join(rows.column_names)
