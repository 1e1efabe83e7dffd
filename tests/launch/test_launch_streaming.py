"""Whole runs on streams: two ranks, a mixture of two data sets with packing, interrupted and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch.test_launch_runs import arguments, summary_of
from tests.support.launch_support import alpaca_rows, assert_same_adapter, launch, tiny_model, write_jsonl

pytestmark = pytest.mark.dist


def test_a_stream_trains_and_resumes(tmp_path: Path) -> None:
    """Two ranks read shares of one mixed stream; an interrupted run goes on as one that was not."""
    model = tiny_model(tmp_path / "model")
    alpaca = write_jsonl(tmp_path / "alpaca.jsonl", alpaca_rows(40))
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(f"note {n} " * (n % 7 + 1) for n in range(60)))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = (str(notes), "--dataset_weights", "0.5", "0.5", "--streaming", "--shuffle_dataset", "true",
            "--max_length", "150", "--max_steps", "4", "--save_steps", "2")  # fmt: skip

    def run(output_dir: Path, *flags: str) -> None:
        words = arguments(model, alpaca, "zero2", output_dir, *flags)
        place = words.index(str(alpaca)) + 1  # the second data set stands beside the first
        finished = launch([*words[:place], *more[:1], *words[place:], *more[1:]])
        assert finished.code == 0, finished.output[-4000:]

    run(whole)
    summary = summary_of(whole)
    assert summary["last_loss"] < summary["first_loss"]
    cut = summary["truncation"]["train"]
    assert cut["streamed"]
    assert cut["rows"] >= 4 * 2 * 2  # steps, ranks, rows of a batch
    assert 0 < cut["rows_cut"] < cut["rows"]
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run(resumed, "--resume_from_checkpoint", "true")
    assert_same_adapter(whole, resumed)


def test_packed_rows_train(tmp_path: Path) -> None:
    """Under ZeRO-3, where the check of packing gathers weights."""
    model = tiny_model(tmp_path / "model")
    alpaca = write_jsonl(tmp_path / "alpaca.jsonl", alpaca_rows(40))
    words = arguments(model, alpaca, "zero3", tmp_path / "out", "--packing", "--max_length", "400", "--max_steps", "3")
    finished = launch(words)
    assert finished.code == 0, finished.output[-4000:]
    summary = summary_of(tmp_path / "out")
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["truncation"]["train"]["rows"] == 40
