"""Image classification: the processor, the rows, and how they become batches."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, Image
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import DataArguments
from launch.data.formats import LABEL_COLUMNS, choose_column

IMAGE_COLUMNS = ("image", "img", "picture")
# What models for image classification call their last layer.
HEADS = ("classifier", "head", "fc", "score")


def load_image_processor(arguments: Arguments) -> BaseImageProcessor:
    """What turns a picture into the model's input (size, mean and deviation of its pretraining).

    Raises:
        UserError: the model's folder or repository has none.
    """
    run = arguments.run
    try:
        return AutoImageProcessor.from_pretrained(
            run.model_name_or_path, revision=run.revision, trust_remote_code=arguments.training.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model_name_or_path {run.model_name_or_path}: no image processor: {error}") from error


def labelled_images(rows: Dataset, run: DataArguments, flag: str) -> Dataset:
    """`rows` as `image` and `label`, the label still as stored.

    Raises:
        UserError: no column with pictures, no label column, or a picture that is missing.
    """
    image = choose_column(rows, run.image_column, IMAGE_COLUMNS, "--image_column", flag)
    label = choose_column(rows, run.label_column, (*LABEL_COLUMNS, "fine_label"), "--label_column", flag)
    if image == label:
        raise UserError(f"{flag}: --image_column and --label_column name the same column, {image!r}.")
    if not isinstance(rows.features[image], Image):
        raise UserError(f"{flag}: column {image!r} holds {rows.features[image]}, not pictures. Choose --image_column.")
    stored = rows.select_columns([image, label]).cast_column(image, Image(decode=False))
    for number, row in enumerate(stored):
        if row[image] is None or row[label] is None:
            raise UserError(f"{flag}: row {number} (counted from 0) has no picture or no label; remove it.")
    kept = rows.select_columns([image, label])
    return kept.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def as_inputs(rows: Dataset, processor: BaseImageProcessor) -> Dataset:
    """`rows` whose pictures are processed when they are read: `pixel_values` (3, height, width) and `labels`."""

    def convert(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [picture.convert("RGB") for picture in batch["image"]]
        return {"pixel_values": list(processor(pictures, return_tensors="pt").pixel_values), "labels": batch["labels"]}

    return rows.with_transform(convert)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: `pixel_values` (B, 3, height, width) and `labels` (B,)."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def head_name(model: PreTrainedModel) -> str:
    """Name of the layer that tells the classes apart, which is new for every data set.

    Raises:
        UserError: none of the usual names.
    """
    found = [name for name in HEADS if hasattr(model, name)]
    if not found:
        raise UserError(
            f"{type(model).__name__} has none of {', '.join(HEADS)}: name its classification layer with "
            "--modules_to_save, so that it is trained and saved."
        )
    return found[0]
