"""Whether model, tokenizer and data fit each other: found from a model without weights and a sample of the rows."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from safetensors import safe_open
from torch import nn

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError, say
from launch.checks.flags import LANGUAGE
from launch.data.values import Rows
from launch.training.processors import Processor, tokenizer_of

SAMPLE = 64  # rows of a stream whose tokens are looked at
OTHER_TABLES = ("relative", "distance", "vision", "visual", "image", "type")


def position_limit(model: nn.Module) -> int | None:
    """Longest row that the model's tables of positions have room for; None without such a table (RoPE, ALiBi).

    OPT's kind of table leaves out its first rows (`offset`), RoBERTa's those up to the padding token.
    """
    limits = []
    for name, module in model.named_modules():
        called = name.rsplit(".", 1)[-1]
        if any(word in name for word in OTHER_TABLES):
            continue
        if isinstance(module, nn.Embedding) and ("position" in called or called in ("wpe", "pos_emb")):
            skipped = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            limits.append(module.num_embeddings - skipped)
    # GPT-J and CodeGen look sines up in a table.
    for name, table in model.named_buffers():
        if name.rsplit(".", 1)[-1] in ("embed_positions", "pos_encoding") and table.dim() == 2:
            limits.append(table.shape[0])
    return min(limits, default=None)


def check_weights(folder: str | None, flag: str) -> None:
    """Opens the safetensors of a local folder: their headers say how long they must be."""
    if folder is None or not os.path.isdir(folder):
        return
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:  # safetensors' own exception has no public base
            raise UserError(f"{flag}: {file} is damaged, or was cut short: {error}. Copy it again.") from error


def check_fit(arguments: Arguments, model: nn.Module, processor: Processor, *data: Rows | None) -> None:
    """Positions and tokens.

    Args:
        model: may be without weights. data: what it will read; of a stream the first rows are looked at.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return
    _check_positions(arguments, model)
    rows = model.get_input_embeddings().weight.shape[0]
    name = arguments.run.model_name_or_path
    for kind in ("pad_token", "eos_token"):
        number = getattr(tokenizer, f"{kind}_id")
        if number is not None and number >= rows and (kind == "pad_token" or arguments.run.task in LANGUAGE):
            raise UserError(
                f"{name}: the tokenizer's {kind} {getattr(tokenizer, kind)!r} has the number {number}, and the model "
                f"has rows for {rows} tokens. Choose another with --{kind}, or resize the model."
            )
    if len(tokenizer) <= rows:
        return
    for part in data:
        sample = islice(iter(part or ()), SAMPLE if isinstance(part, IterableDataset) else None)
        for number, row in enumerate(sample):
            token = max(_tokens(row, processor, tokenizer), default=0)
            if token >= rows:
                raise UserError(
                    f"{name}, row {number} of the data: the tokenizer makes the token {token} of it, and the model has "
                    f"rows for {rows} tokens. They do not belong together, or the model was not resized."
                )


def _tokens(row: dict[str, Any], processor: Processor, tokenizer: Any) -> list[int]:
    if isinstance(row.get("prompt"), list):
        if tokenizer is not processor:
            return []  # pictures among the text
        text = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    else:
        text = "".join(row[name] for name in ("prompt", "completion", "text", "text_pair") if name in row)
    return tokenizer(text, verbose=False)["input_ids"]


def _check_positions(arguments: Arguments, model: nn.Module) -> None:
    """`--max_length` against the model's positions; its default gives way to them."""
    training = arguments.training
    wanted, limit = getattr(training, "max_length", None), position_limit(model)
    if wanted is None:
        return
    if limit is None:
        trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if trained is not None and wanted > trained:
            say(f"--max_length {wanted}: this model was made for {trained} positions; longer rows are new to it.")
    elif wanted > limit:
        if wanted != type(training).max_length:
            raise UserError(f"--max_length {wanted}: this model has {limit} positions; use at most {limit}.")
        training.max_length = limit
        say(f"--max_length is {limit}, not {wanted}: this model has no more positions.")
