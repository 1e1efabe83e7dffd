"""Image classification and pairs of texts: rows, errors, and a run of the launcher on pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from launch import evaluate
from launch.checks.arguments import parse_arguments
from launch.checks.effects import check_task
from launch.checks.errors import UserError
from launch.checks.flags import RunArguments
from launch.data import classification, pictures
from launch.data.rows import load_rows
from tests.launch.test_launch_runs import check_outputs
from tests.support.launch_support import SMALL, launch, write_jsonl

SIZE = 16


def write_pictures(folder: Path, per_class: int, split: str = "train") -> Path:
    """Reddish and bluish noise, in one folder per class."""
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / split / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def tiny_clip(folder: Path) -> Path:
    """CLIP's vision model with a classification head, which GOAT's image recipe adapts."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIZE, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


@pytest.mark.dist
def test_a_run_on_pictures(tmp_path: Path) -> None:
    """GOAT's architecture for pictures: two classes that a colour tells apart are learned, head and adapter saved."""
    data, output_dir = write_pictures(tmp_path / "data", 12), tmp_path / "out"
    write_pictures(tmp_path / "held_out", 5, split="test")
    finished = launch(
        ["--task", "image-classification", "--model_name_or_path", str(tiny_clip(tmp_path / "clip")),
         "--dataset_name", str(data), "--eval_dataset_name", str(tmp_path / "held_out"),
         "--output_dir", str(output_dir), "--learning_rate", "1e-2",
         "--deepspeed", "configs/zero2.json", "--max_steps", "8", "--save_strategy", "no", *SMALL]
    )  # fmt: skip
    assert finished.code == 0, finished.output[-4000:]
    summary = check_outputs(output_dir, steps=8)
    assert summary["classes"] == ["blue", "red"]
    assert summary["eval"]["eval_majority_class_accuracy"] == 0.5
    assert summary["eval"]["eval_accuracy"] == 1.0
    assert math.isfinite(summary["eval"]["eval_loss"])
    after = evaluate.main(["--adapter", str(output_dir), "--dataset_name", str(tmp_path / "held_out")])["metrics"]
    assert after["accuracy"] == 1.0
    assert after["loss"] == pytest.approx(summary["eval"]["eval_loss"], rel=1e-4)
    saved = load_file(output_dir / "adapter_model.safetensors")
    assert any(name.endswith("classifier.weight") for name in saved)
    assert not any("classifier" in name and "lora" in name for name in saved)
    assert sum(name.endswith("lora_B") for name in saved) == 2 * 6


def test_pictures_in_folders_and_in_parquet_are_the_same_rows(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", 3)
    rows = load_rows(str(folder), "--dataset_name", "train", pictures=True)
    rows.rename_columns({"image": "img", "label": "answer"}).to_parquet(tmp_path / "rows.parquet")
    stored = load_rows(str(tmp_path / "rows.parquet"), "--dataset_name", "train", pictures=True)
    first, second = (pictures.labelled_images(r, RunArguments(), "data") for r in (rows, stored))
    assert first.column_names == second.column_names == ["image", "label"]
    assert classification.label_names(first, "data") == classification.label_names(second, "data") == ["blue", "red"]
    for one, two in zip(first, second, strict=True):
        assert np.array_equal(np.asarray(one["image"]), np.asarray(two["image"]))


def test_a_batch_is_what_the_processor_makes(tmp_path: Path) -> None:
    rows = load_rows(str(write_pictures(tmp_path / "data", 2)), "--dataset_name", "train", pictures=True)
    grey = Image.fromarray(np.full((SIZE, SIZE), 7, dtype=np.uint8))
    extra = datasets.Dataset.from_dict({"image": [grey], "label": [0]}, features=rows.features)
    rows = datasets.concatenate_datasets([rows, extra])
    rows = pictures.labelled_images(rows, RunArguments(), "data")
    rows = classification.number_labels(rows, ["blue", "red"], "data")
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    batch = default_data_collator([pictures.as_inputs(rows, processor)[i] for i in range(len(rows))])
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 0, 1, 1, 0]
    expected = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt").pixel_values
    assert torch.equal(batch["pixel_values"], expected)


def test_heads() -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **small))
    assert pictures.head_name(vit) == "classifier"
    with pytest.raises(UserError, match="ViTModel has none of classifier, head"):
        pictures.head_name(vit.vit)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"image_column": "picture"}, "--image_column picture: data has no such column. It has: image, label"),
        ({"image_column": "label", "label_column": "image"}, "holds no pictures"),
        ({"label_column": "image"}, "name the same column"),
    ],
)
def test_columns_that_do_not_fit(wish: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = load_rows(str(write_pictures(tmp_path / "data", 1)), "--dataset_name", "train", pictures=True)
    with pytest.raises(UserError, match=message):
        classification.label_names(pictures.labelled_images(rows, RunArguments(**wish), "data"), "data")


def test_folders_without_pictures_and_broken_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder has no"):
        load_rows(str(tmp_path / "empty"), "--dataset_name", "train", pictures=True)
    rows = load_rows(str(write_pictures(tmp_path / "data", 1)), "--dataset_name", "train", pictures=True)
    features = rows.features
    missing = datasets.Dataset.from_dict({"image": [None], "label": [1]}, features=features)
    with pytest.raises(UserError, match=r"row 2 \(counted from 0\) has no picture"):
        pictures.labelled_images(datasets.concatenate_datasets([rows, missing]), RunArguments(), "data")


@pytest.mark.parametrize(
    ("task", "flag", "value"),
    [
        ("image-classification", "text_column", "text"),
        ("sequence-classification", "image_column", "image"),
        ("causal-lm", "label_column", "label"),
        ("sequence-classification", "prompt_template", "chat"),
    ],
)
def test_flags_of_other_tasks_are_refused(task: str, flag: str, value: str) -> None:
    arguments = parse_arguments(
        ["--task", task, "--model_name_or_path", "m", "--dataset_name", "d", f"--{flag}", value], {}
    )
    with pytest.raises(UserError, match=f"--{flag} has no effect with --task {task}"):
        check_task(arguments.run)


@pytest.mark.parametrize("columns", [classification.TEXT_PAIRS[0], classification.TEXT_PAIRS[-1]])
def test_pairs_of_texts(columns: tuple[str, str], tmp_path: Path) -> None:
    rows = load_rows(str(pairs(tmp_path, columns)), "--dataset_name", "train")
    made = classification.classification_texts(rows, RunArguments(), "data")
    assert made[1] == {"text": "a1", "text_pair": "b1", "label": "yes"}
    named = RunArguments(text_column=columns[1], text_pair_column=columns[0])
    assert classification.classification_texts(rows, named, "data")[1] == {
        "text": "b1",
        "text_pair": "a1",
        "label": "yes",
    }
    alone = classification.classification_texts(rows, RunArguments(text_column=columns[0]), "data")
    assert set(alone.column_names) == {"text", "label"}


def pairs(folder: Path, columns: tuple[str, str]) -> Path:
    rows = [{columns[0]: f"a{i}", columns[1]: f"b{i}", "label": "yes" if i % 2 else "no"} for i in range(4)]
    return write_jsonl(folder / "pairs.jsonl", rows)


def test_a_second_text_needs_a_first(tmp_path: Path) -> None:
    rows = load_rows(str(pairs(tmp_path, ("x", "y"))), "--dataset_name", "train")
    with pytest.raises(UserError, match="--text_pair_column y needs --text_column"):
        classification.classification_texts(rows, RunArguments(text_pair_column="y"), "data")
