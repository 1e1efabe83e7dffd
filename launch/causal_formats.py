"""causal-lm: from rows as people store them to `prompt` and `completion`, as text or as chat messages.

TRL tokenises them, appends the end-of-sequence token and masks the prompt. Text for language modelling is a completion
of nothing, so that data sets of different layouts can be mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import IterableDataset
from trl import maybe_convert_to_chatml

from launch.columns import Rows, choose_column, column_names, refuse_missing, shown
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
# Columns of every layout, in the order in which they are looked for, and those that a row need not have.
LAYOUTS = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output", "input"), ("text",))
OPTIONAL = ("input",)
USABLE = "instruction + output (and input), prompt + completion, messages, conversations, or text"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
Batch = dict[str, list[Any]]


def causal_rows(rows: Rows, run: RunArguments, flag: str, has_chat_template: bool) -> Rows:
    """`rows` as prompt and completion.

    A conversation becomes one row per answer of the assistant, with everything before it as the prompt: the loss then
    covers each answer once, whatever the chat template.

    Raises:
        UserError: no usable columns, a row with a missing value, or messages without a chat template. A stream's rows
            are looked at when they are read.
    """
    rows = _renamed(rows, run, flag)
    layout = next((names for names in LAYOUTS if set(names) - set(OPTIONAL) <= set(column_names(rows))), None)
    if layout is None:
        raise UserError(f"{flag} has no usable columns. It has: {shown(rows)}. Usable are: {USABLE}.")
    kind = layout[0]
    if _is_chat(rows, kind, run) and not has_chat_template:
        cause = "--prompt_template chat" if kind == "instruction" else "messages"
        raise UserError(
            f"{flag} needs a chat template ({cause}), and this model's tokenizer has none. Pass --chat_template_path, "
            "or data with prompt and completion."
        )
    if kind == "text":  # text files and WikiText have empty rows between paragraphs
        rows = rows.filter(lambda row: bool(row["text"] and row["text"].strip()))
    else:
        rows = refuse_missing(rows, tuple(name for name in layout if name not in OPTIONAL), flag)
    naming = {} if isinstance(rows, IterableDataset) else {"desc": "Building prompts"}
    try:
        made = rows.map(_converter(kind, run), batched=True, remove_columns=column_names(rows), **naming)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if not isinstance(made, IterableDataset) and len(made) == 0:
        raise UserError(f"{flag}: no {'row has text' if kind == 'text' else 'conversation has an assistant answer'}.")
    return made


def _renamed(rows: Rows, run: RunArguments, flag: str) -> Rows:
    """`rows` with the columns that flags name called as their layout calls them, and no others."""
    wishes = {name: getattr(run, f"{name}_column", None) for layout in LAYOUTS for name in layout}
    named = {choose_column(rows, old, (), f"--{new}_column", flag): new for new, old in wishes.items() if old}
    if not named:
        return rows
    flags = f"--{'_column, --'.join(sorted(named.values()))}_column"
    layouts = [layout for layout in LAYOUTS if set(layout) & set(named.values())]
    if len(layouts) > 1:
        raise UserError(f"{flags} name columns of different layouts; keep one of: {USABLE}.")
    missing = sorted(set(layouts[0]) - set(OPTIONAL) - set(named.values()))
    if missing:
        raise UserError(f"{flags} need --{missing[0]}_column as well.")
    return rows.select_columns(list(named)).rename_columns({old: new for old, new in named.items() if old != new})


def _is_chat(rows: Rows, kind: str, run: RunArguments) -> bool:
    if kind == "prompt":
        return not isinstance(next(iter(rows))["prompt"], str)
    return kind in ("messages", "conversations") or (kind == "instruction" and run.prompt_template == "chat")


def _converter(kind: str, run: RunArguments) -> Callable[[Batch], Batch]:
    if kind == "prompt":
        return lambda batch: {"prompt": batch["prompt"], "completion": batch["completion"]}
    if kind == "text":
        return lambda batch: {"prompt": [""] * len(batch["text"]), "completion": batch["text"]}
    if kind == "instruction":
        return _alpaca(run.prompt_template)
    return lambda batch: _split_conversations(batch[kind])


def _split_conversations(conversations: list[list[dict[str, Any]]]) -> Batch:
    prompts, completions = [], []
    for conversation in conversations:
        messages = maybe_convert_to_chatml({"messages": conversation})["messages"]
        messages = [{**m, "role": SHAREGPT_ROLES.get(m.get("role"), m.get("role"))} for m in messages]
        for position, message in enumerate(messages):
            if message["role"] == "assistant" and position > 0:
                prompts.append(messages[:position])
                completions.append([message])
    return {"prompt": prompts, "completion": completions}


def _alpaca(template: str) -> Callable[[Batch], Batch]:
    def convert(batch: Batch) -> Batch:
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
