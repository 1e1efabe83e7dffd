"""Image classification: the processor, the rows, and how they become batches."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Image, Value
from transformers import BaseImageProcessor, PreTrainedModel

from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.classification import LABELS_OF_PICTURES, class_names, label_of
from launch.data.values import LeftOut, choose_column

IMAGE_COLUMNS = ("image", "img", "picture")
# What models for image classification call their last layer.
HEADS = ("classifier", "head", "fc", "score")


def labelled_images(rows: Dataset, run: DataArguments, flag: str, regression: bool = False) -> Dataset:
    """`rows` as `image` and `label`: a class's name, or a number."""
    image = choose_column(rows, run.image_column, IMAGE_COLUMNS, "--image_column", flag)
    label = choose_column(rows, run.label_column, LABELS_OF_PICTURES, "--label_column", flag)
    if image == label:
        raise UserError(f"{flag}: --image_column and --label_column name the same column, {image!r}.")
    if not isinstance((rows.features or {}).get(image), Image):
        raise UserError(f"{flag}: column {image!r} holds no pictures. Choose with --image_column.")
    names, left_out, labels = class_names(rows, run), LeftOut(flag), []
    # As stored: a picture is decoded when it is used.
    for number, row in enumerate(rows.cast_column(image, Image(decode=False))):
        where = f"{flag}: row {number} (counted from 0)"
        if row[image] is None:
            raise UserError(f"{where} has no picture; remove it.")
        left_out.add_columns(row, (image, label))
        labels.append(label_of(row, label, where, names, regression))
    kept = rows.select_columns([image])
    kept = kept if image == "image" else kept.rename_column(image, "image")
    return kept.add_column("label", labels, feature=Value("float32" if regression else "string"))


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
