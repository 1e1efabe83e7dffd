"""Pictures and text to text: the processor, the rows, and which part of the model is adapted."""

from __future__ import annotations

import re
from typing import Any

from datasets import Image, List
from transformers import PreTrainedModel

from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.causal import causal_rows
from launch.data.values import Rows, choose_column, missing

IMAGE_COLUMNS = ("image", "images", "picture")
# LLaVA's data marks the place of a picture in the text; the chat template puts it before the text.
PLACEHOLDER = "<image>"


def image_text_rows(rows: Rows, run: DataArguments, flag: str, tokenizer: Any, whole: bool = False) -> Rows:
    """`rows` as prompt and completion (chat messages) with `images`, the list of the pictures of the row."""
    column = choose_column(rows, run.image_column, IMAGE_COLUMNS, "--image_column", flag)
    feature = (rows.features or {}).get(column)
    several = isinstance(feature, List) and isinstance(feature.feature, Image)
    if not several and not isinstance(feature, Image):
        raise UserError(f"{flag}: column {column!r} holds no pictures. Choose with --image_column.")
    # As stored: a picture that goes through `map` decoded is compressed again.
    stored = Image(decode=False)
    rows = rows.cast_column(column, List(stored) if several else stored)
    for number, value in enumerate(rows[column]):
        if missing(value):
            raise UserError(f"{flag}: row {number} (counted from 0) has no picture. Fill or remove this row.")
    made = causal_rows(rows, run, flag, tokenizer, keep=column, as_chat=True, whole=whole)
    made = made.map(
        lambda row: {
            "prompt": [_without_placeholder(message) for message in row["prompt"]],
            "images": row[column] if several else [row[column]],
        },
        remove_columns=[] if column == "images" else [column],
    )
    return made.cast_column("images", List(Image()))


def _without_placeholder(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": message["content"].replace(PLACEHOLDER, "").strip()}


def outside_text(model: PreTrainedModel) -> str | None:
    """A regular expression for the names of all modules outside the language model; None if that is all there is.

    What sees pictures has layers of the same names (q_proj and so on) and stays frozen, as the papers leave it.
    """
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return rf"(?!{re.escape(name)}\.).*" if name else None
