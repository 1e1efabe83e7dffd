"""The loss covers the answer, its end-of-sequence token included, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset

from launch.checks.arguments import Arguments, parse_arguments
from launch.data.causal import causal_rows
from launch.training import modeling, trainers
from launch.training.processors import processor_of_run
from tests.support.launch_support import CHAT_TEMPLATE, tiny_model

ALPACA = [
    {"instruction": "Say it.", "input": "", "output": "yes"},
    {"instruction": "Add.", "input": "1 and 2", "output": "that is 3"},
]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "uno"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "due"},
        ]
    }
]


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    folder = tiny_model(tmp_path / "tiny", CHAT_TEMPLATE)
    parsed = parse_arguments(
        ["--model_name_or_path", str(folder), "--dataset_name", "d", "--optim", "adamw_torch", "--report_to", "none",
         "--output_dir", str(tmp_path / "out"), "--r", "2", "--num_experts", "2"], {}
    )  # fmt: skip
    parsed.training.start()
    yield parsed
    AcceleratorState._reset_state(reset_partial_state=True)


def batch_of(arguments: Arguments, rows: list[dict[str, Any]]) -> tuple[Any, Any, Dataset]:
    """The batch that the trainer would train on, the tokenizer and the rows as prompt and completion."""
    tokenizer = processor_of_run(arguments)
    pairs = causal_rows(Dataset.from_list(rows), arguments.run, "--dataset_name d", tokenizer)
    config = modeling.adapter_config(arguments.adapter, "causal-lm")
    model = modeling.load_model(arguments, config, {}, tokenizer)
    trainer = trainers.build_trainer(arguments, model, tokenizer, pairs, None, [])
    return trainer.data_collator(list(trainer.train_dataset)), tokenizer, pairs


def check(batch: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> None:
    for row, (prompt, answer) in enumerate(texts):
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(answer)["input_ids"]
        length = len(prompt_ids) + len(answer_ids)
        padding = batch["input_ids"].shape[1] - length
        assert batch["input_ids"][row, :length].tolist() == prompt_ids + answer_ids
        expected = [-100] * len(prompt_ids) + answer_ids + [-100] * padding
        assert batch["labels"][row].tolist() == expected
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * padding


def test_alpaca_mask(arguments: Arguments):
    batch, tokenizer, pairs = batch_of(arguments, ALPACA)
    assert len(pairs) == 2
    check(batch, tokenizer, [(row["prompt"], row["completion"] + tokenizer.eos_token) for row in pairs])


def test_messages_mask(arguments: Arguments):
    batch, tokenizer, _ = batch_of(arguments, MESSAGES)
    end = tokenizer.eos_token
    first = f"<user>one{end}<assistant>"
    second = f"{first}uno{end}<user>two{end}<assistant>"
    check(batch, tokenizer, [(first, f"uno{end}"), (second, f"due{end}")])


def test_rows_without_room_for_an_answer_are_refused(arguments: Arguments):
    arguments.training.max_length = 4
    with pytest.raises(ValueError, match="--max_length 4"):
        batch_of(arguments, ALPACA)
