"""causal-lm: from rows as people store them to `prompt` and `completion`, as text or as chat messages.

TRL tokenises them, appends the end-of-sequence token and masks the prompt. Text for language modelling is a completion
of nothing, so that data sets of different layouts can be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from datasets import IterableDataset, Value
from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from trl import maybe_convert_to_chatml

from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.columns import TEXTS, Rows, choose_column, column_names, refuse_missing, shown

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
# Columns of every layout, in the order in which they are looked for, and those that a row need not have.
LAYOUTS = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output", "input"), ("text",))
OPTIONAL = ("input",)
CHATML = ("role", "content")
MESSAGE_FIELDS = {"prompt": CHATML, "completion": CHATML, "messages": CHATML, "conversations": ("from", "value")}
FORMATS = ("prompt_format", "completion_format")
FORMATTED = "formatted"  # by --prompt_format and --completion_format
USABLE = "instruction + output (and input), prompt + completion, messages, conversations, or text"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
Row = dict[str, Any]
Pair = tuple[Any, Any]  # prompt and completion


def causal_rows(
    rows: Rows, run: DataArguments, flag: str, has_chat_template: bool, keep: str | None = None, as_chat: bool = False
) -> Rows:
    """`rows` as prompt and completion.

    A conversation becomes one row per answer of the assistant, with everything before it as the prompt: the loss then
    covers each answer once, whatever the chat template.

    Args:
        rows: a data set or a stream. flag: the flag that named it, for messages. has_chat_template: of the tokenizer.
        keep: a column that goes with every prompt that comes from its row.
        as_chat: make chat messages of text.

    Raises:
        UserError: no usable columns, a row with a missing value, or messages without a chat template. A stream's rows
            are looked at when they are read.
    """
    rows, layout = _layout(rows, run, flag, keep)
    kind = layout[0]
    is_chat = as_chat or _is_chat(rows, kind, run)
    if is_chat and not has_chat_template:
        cause = "--prompt_template chat" if kind == "instruction" else "messages"
        raise UserError(
            f"{flag} needs a chat template ({cause}), and this model's tokenizer has none. Pass --chat_template_path, "
            "or data with prompt and completion."
        )
    if kind == "text":  # text files and WikiText have empty rows between paragraphs
        rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    elif kind != FORMATTED:
        rows = refuse_missing(rows, tuple(name for name in layout if name not in OPTIONAL), flag)
    _refuse_other_types(rows, layout, flag)
    pairs_of = _pairs(kind, run, is_chat)

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"prompt": [], "completion": [], **({keep: []} if keep else {})}
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for prompt, completion in pairs_of(row):
                made["prompt"].append(_chat("user", prompt) if as_chat else prompt)
                made["completion"].append(_chat("assistant", completion) if as_chat else completion)
                if keep:
                    made[keep].append(row[keep])
        return made

    naming = {} if isinstance(rows, IterableDataset) else {"desc": "Building prompts"}
    try:
        made = rows.map(convert, batched=True, remove_columns=column_names(rows), **naming)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if not isinstance(made, IterableDataset) and len(made) == 0:
        raise UserError(f"{flag}: no {'row has text' if kind == 'text' else 'conversation has an assistant answer'}.")
    return made


def _layout(rows: Rows, run: DataArguments, flag: str, keep: str | None) -> tuple[Rows, tuple[str, ...]]:
    """`rows` with their layout's own names for columns, and the layout."""
    if run.prompt_format or run.completion_format:
        for name in FORMATS:
            if getattr(run, name) is None:
                raise UserError(f"--prompt_format and --completion_format need each other; --{name} is missing.")
        needed = {name: flag_of for flag_of in FORMATS for name in _variables(getattr(run, flag_of))}
        for name, flag_of in needed.items():
            choose_column(rows, name, (), f"--{flag_of} uses", flag)
        return rows.select_columns(list({**needed, keep: ""} if keep else needed)), (FORMATTED,)
    rows = _renamed(rows, run, flag, keep)
    names = set(column_names(rows))
    layout = next((layout for layout in LAYOUTS if set(layout) - set(OPTIONAL) <= names), None)
    if layout is None:
        raise UserError(f"{flag} has no usable columns. It has: {shown(rows)}. Usable are: {USABLE}.")
    return rows, layout


def _refuse_other_types(rows: Rows, layout: tuple[str, ...], flag: str) -> None:
    """Raises unless columns hold text, or messages where a layout has them; a stream may not know its types."""
    if rows.features is None or layout[0] == FORMATTED:
        return
    present = [name for name in layout if name in rows.features]
    is_text = {}
    for name in present:
        feature = rows.features[name]
        message = getattr(feature, "feature", None)
        fields = MESSAGE_FIELDS.get(name)
        is_text[name] = feature in TEXTS
        if fields is not None and isinstance(message, dict) and set(fields) <= set(message):
            continue
        if name in ("messages", "conversations"):
            shape = ", ".join(f'"{field}": ...' for field in fields or ())
            raise UserError(f"{flag}: column {name!r} holds {feature}, not lists of {{{shape}}}.")
        if not is_text[name] and not (name in OPTIONAL and feature == Value("null")):
            raise UserError(f"{flag}: column {name!r} holds {feature}, not text. Write the values as strings.")
    if layout[0] == "prompt" and is_text["prompt"] != is_text["completion"]:
        raise UserError(f"{flag}: of prompt and completion, one holds text and one messages; make both the same.")


def _renamed(rows: Rows, run: DataArguments, flag: str, keep: str | None) -> Rows:
    """`rows` with the columns that flags name called as their layout calls them, and no others but `keep`."""
    columns = {name: getattr(run, f"{name}_column", None) for layout in LAYOUTS for name in layout}
    named = {
        choose_column(rows, old, (), f"--{new}_column", flag): new for new, old in columns.items() if old is not None
    }
    if not named:
        return rows
    flags = f"--{'_column, --'.join(sorted(named.values()))}_column"
    layouts = [layout for layout in LAYOUTS if set(layout) & set(named.values())]
    if len(layouts) > 1:
        raise UserError(f"{flags} name columns of different layouts; keep one of: {USABLE}.")
    missing = sorted(set(layouts[0]) - set(OPTIONAL) - set(named.values()))
    if missing:
        raise UserError(f"{flags} need --{missing[0]}_column as well.")
    kept = rows.select_columns([*named, *([keep] if keep else [])])
    return kept.rename_columns({old: new for old, new in named.items() if old != new})


def _is_chat(rows: Rows, kind: str, run: DataArguments) -> bool:
    if kind == "prompt":
        return not isinstance(next(iter(rows))["prompt"], str)
    return kind in ("messages", "conversations") or (kind == "instruction" and run.prompt_template == "chat")


def _chat(role: str, content: Any) -> Any:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _pairs(kind: str, run: DataArguments, is_chat: bool) -> Callable[[Row], Iterable[Pair]]:
    """What makes prompts and completions of one row."""
    if kind == "prompt":
        return lambda row: [(row["prompt"], row["completion"])]
    if kind == "text":
        return lambda row: [("", row["text"])]
    if kind == "instruction":
        return lambda row: [_alpaca(row, "chat" if is_chat else run.prompt_template)]
    if kind == FORMATTED:
        prompt, completion = (_template(run, name) for name in FORMATS)
        return lambda row: [(prompt(row), completion(row))]
    return lambda row: _answers(row[kind])


def _answers(conversation: list[Row]) -> Iterable[Pair]:
    """Every answer of the assistant, and all before it."""
    messages = maybe_convert_to_chatml({"messages": conversation})["messages"]
    messages = [{**m, "role": SHAREGPT_ROLES.get(m.get("role"), m.get("role"))} for m in messages]
    for position, message in enumerate(messages):
        if message["role"] == "assistant" and position > 0:
            yield messages[:position], [message]


def _alpaca(row: Row, template: str) -> Pair:
    instruction, context, output = row["instruction"], row.get("input") or "", row["output"]
    if template == "alpaca":
        wording = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
        return wording.format(instruction=instruction, input=context), output
    text = f"{instruction}\n{context}" if context else instruction
    return (_chat("user", text), _chat("assistant", output)) if template == "chat" else (f"{text}\n", output)


def _template(run: DataArguments, name: str) -> Callable[[Row], str]:
    """The Jinja template in flag `name` as a function of a row."""
    text = getattr(run, name)
    template = TEMPLATES.from_string(text)

    def render(row: Row) -> str:
        try:
            made = template.render(row)
        except (UndefinedError, TypeError, LookupError) as error:
            raise UserError(f"--{name} {text!r}: {error}, in a row {str(row)[:300]}") from error
        if not made:
            raise UserError(f"--{name} {text!r} makes nothing of a row: {str(row)[:300]}")
        return made

    return render


def _variables(text: str) -> list[str]:
    """The columns that a template reads, in order of their names."""
    try:
        return sorted(find_undeclared_variables(TEMPLATES.parse(text)))
    except TemplateSyntaxError as error:
        raise UserError(f"{text!r} is no Jinja template: {error}.") from error
