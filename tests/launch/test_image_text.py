"""Pictures and text: rows, masks, and which part of the model is adapted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, List
from PIL import Image as Picture
from torch import nn

from launch.checks.arguments import parse_arguments
from launch.checks.effects import check_effects, check_task
from launch.checks.errors import UsageError, UserError
from launch.checks.flags import RunArguments
from launch.data import pictures, sources
from launch.training import modeling, trainers
from launch.training.processors import processor_of_run
from tests.support.launch_support import chat_tokenizer, tiny_model
from tests.support.vision_language import tiny_llava, write_questions

SQUARE = Picture.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def rows_of(images: Any, several: bool, **columns: list[Any]) -> Dataset:
    feature = List(Image()) if several else Image()
    plain = Dataset.from_dict(columns)
    return Dataset.from_dict({"image": images, **columns}, features=Features({"image": feature, **plain.features}))


def test_every_layout_becomes_chat_with_pictures() -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."},
            {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Grey."}]  # fmt: skip
    for rows, run, count in (
        (rows_of([SQUARE], False, prompt=["What?"], completion=["A square."]), RunArguments(), 1),
        (rows_of([[SQUARE]], True, instruction=["What?"], output=["A square."]), RunArguments(), 1),
        (rows_of([SQUARE], False, q=["What?"], a=["A square."]),
         RunArguments(prompt_format="{{ q }}", completion_format="{{ a }}"), 1),
        (rows_of([SQUARE], False, conversations=[talk]), RunArguments(), 2),
    ):  # fmt: skip
        made = pictures.image_text_rows(rows, run, "data", chat_tokenizer())
        assert set(made.column_names) == {"prompt", "completion", "images"}
        assert len(made) == count
        assert made[0]["prompt"] == [{"role": "user", "content": "What?"}]
        assert made[0]["completion"] == [{"role": "assistant", "content": "A square."}]
        for row in made:
            assert [np.array_equal(np.asarray(picture), np.asarray(SQUARE)) for picture in row["images"]] == [True]


def test_rows_that_do_not_fit() -> None:
    rows = rows_of([SQUARE, None], False, prompt=["a", "b"], completion=["c", "d"])
    with pytest.raises(UserError, match=r"row 1 \(counted from 0\) has no picture"):
        pictures.image_text_rows(rows, RunArguments(), "data", chat_tokenizer())
    with pytest.raises(UserError, match="column 'prompt' holds no pictures"):
        pictures.image_text_rows(rows, RunArguments(image_column="prompt"), "data", chat_tokenizer())
    with pytest.raises(UserError, match="chat template"):
        pictures.image_text_rows(rows.take(1), RunArguments(), "data", None)


def test_formats_name_what_is_wrong() -> None:
    rows = rows_of([SQUARE], False, q=["What?"], choices=[["x"]])
    for run, message in (
        (RunArguments(prompt_format="{{ q }}"), "--completion_format is missing"),
        (RunArguments(prompt_format="{{ q }}", completion_format="{{ nope }}"), r"nope: .* no such column. It has: i"),
        (RunArguments(prompt_format="{{ q", completion_format="a"), "is no Jinja template"),
        (RunArguments(prompt_format="{{ q }}", completion_format="{{ choices[3] }}"), "has no element 3"),
        (RunArguments(prompt_format="{{ q }}", completion_format="{% if not q %}a{% endif %}"), "makes nothing of a"),
    ):
        with pytest.raises(UserError, match=message):
            pictures.image_text_rows(rows, run, "data", chat_tokenizer())


def parse(model: Path, data: Path, *flags: str) -> Any:
    return parse_arguments(
        ["--task", "image-text-to-text", "--model_name_or_path", str(model), "--dataset_name", str(data),
         "--num_experts", "2", "--r", "2", "--optim", "adamw_torch", "--report_to", "none",
         "--prompt_format", "{{ question }}",
         "--completion_format", "{{ choices[correct_choice_idx] }}", *flags], {}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "vision"),
    [(["all-linear"], False), (["q_proj", "v_proj"], False), (["q_proj"], False), ([r".*\.(q|v)_proj"], True)],
)
def test_the_language_model_alone_is_adapted(tmp_path: Path, targets: list[str], vision: bool) -> None:
    parsed = parse(tiny_llava(tmp_path / "model"), tmp_path, "--target_modules", *targets)
    config = modeling.adapter_config(parsed.adapter, parsed.run.task)
    modeling.check_model(parsed, config, modeling.build_on_meta(parsed, {}))
    model = modeling.load_model(parsed, config, {}, processor_of_run(parsed))
    adapted = {name for name, _ in model.named_parameters() if "lora_B" in name}
    assert any("language_model" in name for name in adapted)
    assert any("vision_tower" in name for name in adapted) == vision
    assert not any("lm_head" in name or "projector" in name for name in adapted)


def test_the_batch_trains_the_answer_alone(tmp_path: Path) -> None:
    model, data = tiny_llava(tmp_path / "model"), write_questions(tmp_path / "rows.parquet", 4)
    parsed = parse(model, data, "--output_dir", str(tmp_path / "out"))
    processor = processor_of_run(parsed)
    rows, _, _ = sources.load_data(parsed, processor)
    parsed.training.start()
    config = modeling.adapter_config(parsed.adapter, parsed.run.task)
    trainer = trainers.build_trainer(
        parsed, modeling.load_model(parsed, config, {}, processor), processor, rows, None, []
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    for ids, labels, answer in zip(batch["input_ids"], batch["labels"], ["red", "blue"] * 2, strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == f"{answer}<eos>"
        assert int((ids == processor.image_token_id).sum()) == 4
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


def test_what_is_for_text_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_length"):
        parse(tmp_path, tmp_path, "--max_length", "8")
    with pytest.raises(UserError, match="--packing is not for --task image-text-to-text"):
        check_effects(parse(tmp_path, tmp_path, "--packing"))
    with pytest.raises(UserError, match="--streaming has no effect with --task image-text-to-text"):
        check_task(parse(tmp_path, tmp_path, "--streaming").run)
    with pytest.raises(UserError, match="not a processor of pictures and text"):
        processor_of_run(parse(tiny_model(tmp_path / "text"), tmp_path))


def test_a_model_of_text_alone_is_adapted_whole() -> None:
    class Text(nn.Module):
        def get_decoder(self) -> nn.Module:
            return self

    assert pictures.outside_text(Text()) is None
    assert re.fullmatch(r"(?!model\.language_model\.).*", "model.vision_tower.q_proj")
