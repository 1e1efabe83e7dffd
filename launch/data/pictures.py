"""Data with pictures: labelled ones, and those among text; and which part of a model sees them."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset, Image, List, Value
from transformers import BaseImageProcessor, PreTrainedModel

from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.causal import causal_rows
from launch.data.classification import LABELS_OF_PICTURES, class_names, label_of
from launch.data.values import LeftOut, Rows, choose_column, missing

COLUMNS = ("image", "images", "img", "picture")
# As stored: a picture is decoded when it is used, and one that goes through `map` decoded is compressed again.
STORED = Image(decode=False)
# LLaVA's data marks the place of a picture in the text; the chat template puts it before the text.
PLACEHOLDER = "<image>"
# What models for image classification call their last layer.
HEADS = ("classifier", "head", "fc", "score")


def labelled_images(rows: Dataset, run: DataArguments, flag: str, regression: bool = False) -> Dataset:
    """`rows` as `image` and `label`: a class's name, or a number."""
    image = _column(rows, run, flag, lists=False)[0]
    label = choose_column(rows, run.label_column, LABELS_OF_PICTURES, "--label_column", flag)
    if image == label:
        raise UserError(f"{flag}: --image_column and --label_column name the same column, {image!r}.")
    names, left_out, labels = class_names(rows, run), LeftOut(flag), []
    for number, row in enumerate(rows.cast_column(image, STORED)):
        where = f"{flag}: row {number} (counted from 0)"
        if row[image] is None:
            raise UserError(f"{where} has no picture. Fill or remove this row.")
        left_out.add_columns(row, (image, label))
        labels.append(label_of(row, label, where, names, regression))
    kept = rows.select_columns([image])
    kept = kept if image == "image" else kept.rename_column(image, "image")
    return kept.add_column("label", labels, feature=Value("float32" if regression else "string"))


def image_text_rows(rows: Rows, run: DataArguments, flag: str, tokenizer: Any, whole: bool = False) -> Rows:
    """`rows` as prompt and completion (chat messages) with `images`, the list of the pictures of the row."""
    column, several = _column(rows, run, flag, lists=True)
    rows = rows.cast_column(column, List(STORED) if several else STORED)
    for number, value in enumerate(rows[column]):
        if missing(value):
            raise UserError(f"{flag}: row {number} (counted from 0) has no picture. Fill or remove this row.")
    made = causal_rows(rows, run, flag, tokenizer, keep=column, as_chat=True, whole=whole)
    made = made.map(
        lambda row: {
            "prompt": [{**m, "content": m["content"].replace(PLACEHOLDER, "").strip()} for m in row["prompt"]],
            "images": row[column] if several else [row[column]],
        },
        remove_columns=[] if column == "images" else [column],
    )
    return made.cast_column("images", List(Image()))


def _column(rows: Rows, run: DataArguments, flag: str, lists: bool) -> tuple[str, bool]:
    """The column with pictures, and whether a row has a list of them."""
    column = choose_column(rows, run.image_column, COLUMNS, "--image_column", flag)
    feature = (rows.features or {}).get(column)
    several = lists and isinstance(feature, List) and isinstance(feature.feature, Image)
    if not several and not isinstance(feature, Image):
        raise UserError(f"{flag}: column {column!r} holds no pictures. Choose with --image_column.")
    return column, several


def as_inputs(rows: Dataset, processor: BaseImageProcessor) -> Dataset:
    """`rows` whose pictures are processed when they are read: `pixel_values` (3, height, width) and `labels`."""

    def convert(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [picture.convert("RGB") for picture in batch["image"]]
        return {"pixel_values": list(processor(pictures, return_tensors="pt").pixel_values), "labels": batch["labels"]}

    return rows.with_transform(convert)


def head_name(model: PreTrainedModel) -> str:
    """Name of the layer that tells the classes apart, which is new for every data set."""
    found = [name for name in HEADS if hasattr(model, name)]
    if not found:
        raise UserError(
            f"{type(model).__name__} has none of {', '.join(HEADS)}: name its classification layer with "
            "--modules_to_save, so that it is trained and saved."
        )
    return found[0]


def outside_text(model: PreTrainedModel) -> str | None:
    """A regular expression for the names of all modules outside the language model; None if that is all there is.

    What sees pictures has layers of the same names (q_proj and so on) and stays frozen, as the papers leave it.
    """
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return rf"(?!{re.escape(name)}\.).*" if name else None
