"""causal-lm: from rows as people store them to `prompt` and `completion`, as text or as chat messages.

TRL tokenises them, appends the end-of-sequence token and masks the prompt. Text for language modelling is a completion
of nothing, so that data sets of different layouts can be mixed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, List, Value
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from launch.checks.errors import UserError
from launch.checks.flags import FORMATS, DataArguments
from launch.data.values import (
    WORDED,
    LeftOut,
    Row,
    Rows,
    choose_column,
    column_names,
    conversation_of,
    decoded,
    first_row,
    missing,
    read_batch,
    text_of,
    user_error,
)

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
FORMATTED = "formatted"  # by --prompt_format and --completion_format
TURNS = "turns"  # prompt and completion that are messages
USABLE = "instruction + output (and input), prompt + completion, messages, conversations, or text"
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
Pair = tuple[Any, Any]  # prompt and completion
# Every answer repeats what stands before it: so much of one conversation, of which a message counts as 100 characters
# more, is copied and tokenised in a minute.
MOST_REPEATED = 100_000_000


class Converter:
    """Makes prompts and completions of the rows of one data set; its arguments are those of `causal_rows`."""

    def __init__(
        self,
        rows: Rows,
        run: DataArguments,
        flag: str,
        tokenizer: Any,
        keep: str | None,
        as_chat: bool,
        whole: bool,
    ) -> None:
        self.run, self.flag, self.tokenizer, self.keep, self.whole = run, flag, tokenizer, keep, whole
        self.left_out, self.as_chat = LeftOut(flag), as_chat
        self.layout, self.columns = layout_of(rows, run, flag)
        if self.layout == "prompt" and isinstance(first_row(rows, flag).get(self.columns["prompt"]), list):
            self.layout = TURNS
        worded = self.layout == "instruction" and (as_chat or run.prompt_template == "chat")
        self.converses = worded or self.layout in (TURNS, "messages", "conversations")
        is_chat, template = self.converses or as_chat, str(getattr(tokenizer, "chat_template", None) or "")
        if is_chat and not template:
            cause = "--prompt_template chat" if self.layout == "instruction" else "messages"
            raise UserError(
                f"{flag} needs a chat template ({cause}), and this model's tokenizer has none. Pass "
                "--chat_template_path, or data with prompt and completion."
            )
        # A template words a key of messages if it names it.
        self.words = set(re.findall(r"\w+", template))
        self.has_tools = self.converses and not as_chat and "tools" in self.words
        self.reads = {*self.columns.values(), keep}
        if self.converses:
            self.reads |= {"system"} if not as_chat else set()
            self.reads |= {"tools"} if self.has_tools else set()
            self.reads |= {"history"} if worded else set()
        # Messages keep the keys that each of them has.
        self.features = Features(dict.fromkeys(("prompt", "completion"), List(Json()) if is_chat else Value("string")))
        if self.has_tools:
            self.features["tools"] = Value("string")
        if keep:
            self.features[keep] = rows.features[keep]

    def __call__(self, batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """For `map`: a batch of rows as a batch of prompts and completions."""
        made = []
        for where, row in read_batch(batch, numbers, self.flag):
            self.left_out.add_columns(row, self.reads)
            more = {"tools": _tools(row, where) if self.has_tools else None, self.keep: row.get(self.keep)}
            try:
                made += [{**more, "prompt": prompt, "completion": answer} for prompt, answer in self.pairs(row, where)]
            except (TypeError, ValueError, LookupError) as error:  # such as a number where a list should be
                raise user_error(error, where) from error
        return {name: [row[name] for row in made] for name in self.features}

    def pairs(self, row: Row, where: str) -> Iterator[Pair]:
        """Prompts and completions of one row."""
        if self.converses:
            yield from self._conversation(row, where)
            return
        if self.layout == "text":  # text files and WikiText have empty rows between paragraphs
            pair = "", text_of(row, self.columns["text"], where, optional=True)
            if not pair[1]:
                return
        elif self.layout == FORMATTED:
            pair = tuple(_formatted(getattr(self.run, name), name, row, where) for name in FORMATS)
        elif self.layout == "prompt":
            pair = tuple(text_of(row, self.columns[name], where) for name in ("prompt", "completion"))
        else:
            pair = self._alpaca(row, where, self.run.prompt_template)
        if self.as_chat:
            yield from self._answers([_said("user", pair[0]), _said("assistant", pair[1])], where, row)
        else:
            yield pair

    def _alpaca(self, row: Row, where: str, template: str) -> Pair:
        instruction, output = (text_of(row, self.columns[name], where) for name in ("instruction", "output"))
        context = text_of(row, self.columns["input"], where, optional=True) if "input" in self.columns else ""
        if template == "alpaca":
            wording = ALPACA_WITH_INPUT if context else ALPACA_WITHOUT_INPUT
            return wording.format(instruction=instruction, input=context), output
        text = f"{instruction}\n{context}" if context else instruction
        return (text, output) if template == "chat" else (f"{text}\n", output)

    def _conversation(self, row: Row, where: str) -> Iterator[Pair]:
        """The row's messages, with its system message and its history in front."""
        if self.layout == "instruction":
            text, output = self._alpaca(row, where, "chat")
            messages = [*_history(row, where), _said("user", text), _said("assistant", output)]
        else:
            first = "prompt" if self.layout == TURNS else self.layout
            messages = conversation_of(row, self.columns[first], where, pictures=self.as_chat)
        system = "" if self.as_chat else text_of(row, "system", where, optional=True)
        if system and messages[0]["role"] != "system":
            messages = [_said("system", system), *messages]
        if self.layout != TURNS:
            yield from self._answers(messages, where, row)
            return
        answers = conversation_of(row, self.columns["completion"], where)
        if any(message.pop("weight", 1) == 0 for message in answers):
            raise UserError(f"{where}: all of a completion is trained, and a message in it has weight 0; remove it.")
        if any(message.pop("weight", 0) for message in messages):
            self.left_out.add("keys of messages that are not used, since a prompt is not trained", ["weight"])
        messages, completion = self._worded(messages, where), self._worded(answers, where)
        self._render([*messages, *completion], where, row)
        yield messages, completion

    def _answers(self, messages: list[Row], where: str, row: Row) -> Iterator[Pair]:
        """Every trained answer of the assistant, and all before it."""
        weights = [message.pop("weight", 1) for message in messages]
        if self.whole and 0 in weights:
            raise UserError(f"{where}: --completion_only_loss false trains all of a row, and a message has weight 0.")
        messages = self._worded(messages, where)
        ends = [i for i, m in enumerate(messages) if i > 0 and m["role"] == "assistant" and weights[i]]
        if not ends:
            self.left_out.add("left out", ["conversations without an answer to train on"])
            return
        sizes = [0, *accumulate(len(message["content"]) + 100 for message in messages)]
        if not self.whole and (repeated := sum(sizes[end] for end in ends)) > MOST_REPEATED:
            raise UserError(
                f"{where}: the conversation has {len(messages):,} messages and {len(ends):,} answers, each of which is "
                f"trained with all before it: {repeated:,} characters, more than {MOST_REPEATED:,}. Split it into "
                "several rows."
            )
        self._render(messages[: ends[-1] + 1], where, row)
        for position in ends[-1:] if self.whole else ends:
            yield messages[:position], [messages[position]]

    def _worded(self, messages: list[Row], where: str) -> list[Row]:
        """Messages with the keys that the chat template words."""
        for number, message in enumerate(messages, 1):
            if not message["content"] and message["role"] == "assistant" and "tool_calls" not in self.words:
                raise UserError(
                    f"{where}, message {number}: the answer is a tool call, which this model's chat template does not "
                    "word. Pass --chat_template_path with one that does, or remove the row."
                )
        unused = {key for message in messages for key in message} - self.words - {*WORDED}
        self.left_out.add("keys of messages that the chat template does not use", unused)
        return [{k: v for k, v in message.items() if k in self.words or k in WORDED} for message in messages]

    def _render(self, messages: list[Row], where: str, row: Row) -> None:
        """Asks the chat template whether it takes a conversation; a template for pictures wants another form."""
        if self.as_chat or not hasattr(self.tokenizer, "apply_chat_template"):
            return
        tools = decoded(_tools(row, where), where) if self.has_tools else None
        try:
            self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:  # whatever a template raises, and what Python raises inside it
            raise UserError(f"{where}: the chat template refuses this conversation: {error}") from error


def causal_rows(
    rows: Rows,
    run: DataArguments,
    flag: str,
    tokenizer: Any = None,
    keep: str | None = None,
    as_chat: bool = False,
    whole: bool = False,
) -> Rows:
    """`rows` as prompt and completion.

    A conversation becomes one row per answer of the assistant, with everything before it as the prompt: the loss then
    covers each answer once, whatever the chat template.

    Args:
        flag: the flag that named the data set, for messages. tokenizer: its chat template words messages; None: there
            is none. keep: a column that goes with every prompt. as_chat: make chat messages of text. whole: train all
            of a row; a conversation is then one row. A stream's rows are looked at when they are read.
    """
    convert = Converter(rows, run, flag, tokenizer, keep, as_chat, whole)
    # Not from the cache: every run says what is left out.
    how = {} if isinstance(rows, IterableDataset) else {"desc": "Building prompts", "load_from_cache_file": False}
    how |= {"batched": True, "with_indices": True, "features": convert.features}
    try:
        made = rows.map(convert, remove_columns=list(rows.column_names or next(iter(rows))), **how)
    except Exception as error:
        raise user_error(error, flag) from error
    if isinstance(made, Dataset) and len(made) == 0:
        what = "row has text" if convert.layout == "text" else "conversation has an assistant answer"
        raise UserError(f"{flag}: no {what}.")
    return made


def layout_of(rows: Rows, run: DataArguments, flag: str) -> tuple[str, dict[str, str]]:
    """The layout's name, and which of its columns are called how."""
    if run.prompt_format or run.completion_format:
        for name in FORMATS:
            if getattr(run, name) is None:
                raise UserError(f"--prompt_format and --completion_format need each other; --{name} is missing.")
        needed = {name: flag_of for flag_of in FORMATS for name in _variables(getattr(run, flag_of))}
        return FORMATTED, {name: choose_column(rows, name, (), f"--{of} uses", flag) for name, of in needed.items()}
    names = column_names(rows)
    wished = {name: getattr(run, f"{name}_column", None) for layout in LAYOUTS for name in layout}
    named = {name: column for name, column in wished.items() if column is not None}
    for name, column in named.items():
        choose_column(rows, column, (), f"--{name}_column", flag)
    if named:
        flags = f"--{'_column, --'.join(sorted(named))}_column"
        layouts = [layout for layout in LAYOUTS if set(layout) & set(named)]
        if len(layouts) > 1:
            raise UserError(f"{flags} name columns of different layouts; keep one of: {USABLE}.")
        lacking = sorted(set(layouts[0]) - set(OPTIONAL) - set(named))
        if lacking:
            raise UserError(f"{flags} need --{lacking[0]}_column as well.")
        return layouts[0][0], named
    layout = next((layout for layout in LAYOUTS if set(layout) - set(OPTIONAL) <= set(names)), None)
    if layout is None:
        raise UserError(f"{flag} has no usable columns. It has: {', '.join(names)}. Usable are: {USABLE}.")
    return layout[0], {name: name for name in layout if name in names or name in OPTIONAL}


def _said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _history(row: Row, where: str) -> list[Row]:
    """Earlier turns in Alpaca rows: pairs of instruction and answer."""
    turns = row.get("history")
    if missing(turns):
        return []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise UserError(f"{where}: history is no list of [instruction, answer]: {str(turns)[:100]}.")
    columns = [{"user": turn[0], "assistant": turn[1]} for turn in turns]
    return [_said(role, text_of(turn, role, f"{where}, history")) for turn in columns for role in turn]


def _tools(row: Row, where: str) -> str | None:
    """A row's tools as TRL takes them: JSON text."""
    found = row.get("tools")
    if missing(found):
        return None
    found = decoded(found, f"{where}: tools")
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(f"{where}: tools are no list of objects: {str(found)[:100]}.")
    return json.dumps(found)


@functools.cache
def _template(text: str) -> Callable[..., str]:
    return TEMPLATES.from_string(text).render


def _formatted(text: str, name: str, row: Row, where: str) -> str:
    try:
        made = _template(text)(row)
    except (TemplateError, TypeError, LookupError, ValueError) as error:
        raise UserError(f"{where}: --{name} {text!r}: {error}, in a row {str(row)[:300]}") from error
    if missing(made):
        raise UserError(f"{where}: --{name} {text!r} makes nothing of a row: {str(row)[:300]}")
    return made


def _variables(text: str) -> list[str]:
    """The columns that a template reads, in order of their names."""
    try:
        return sorted(find_undeclared_variables(TEMPLATES.parse(text)))
    except TemplateSyntaxError as error:
        raise UserError(f"{text!r} is no Jinja template: {error}.") from error
