"""Reading files and folders, and bringing rows into the trainers' shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from launch.checks.errors import UserError
from launch.checks.flags import RunArguments
from launch.data.causal import causal_rows
from launch.data.classification import classification_texts, label_names, number_labels
from launch.data.rows import load_rows
from tests.support.launch_support import alpaca_rows, chat_tokenizer, values, write_jsonl

FLAG = "--dataset_name x"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path: Path, suffix: str):
    rows = Dataset.from_list(alpaca_rows(5))
    path = tmp_path / f"data.{suffix}"
    {"jsonl": rows.to_json, "json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    assert values(load_rows(str(path), FLAG, "train")) == alpaca_rows(5)
    assert len(load_rows(str(path), FLAG, "train", limit=2)) == 2


def test_folder_with_splits(tmp_path: Path):
    write_jsonl(tmp_path / "boolq.train.jsonl", alpaca_rows(4))
    write_jsonl(tmp_path / "boolq.test.jsonl", alpaca_rows(3))
    assert len(load_rows(str(tmp_path), FLAG, "train")) == 4
    assert len(load_rows(str(tmp_path), FLAG, None)) == 3
    with pytest.raises(UserError, match=r"no split 'dev'; it has: .*test"):
        load_rows(str(tmp_path), FLAG, "dev")


def test_bad_files(tmp_path: Path):
    for name, content, message in (("empty.jsonl", "", "is empty"), ("notes.doc", "hello", "is not read; use .jsonl")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name}.*{message}"):
            load_rows(str(tmp_path / name), FLAG, "train")


def _causal(rows: list[dict[str, Any]], chat: bool = False, **run: Any) -> list[dict[str, Any]]:
    return causal_rows(Dataset.from_list(rows), RunArguments(**run), FLAG, chat_tokenizer() if chat else None).to_list()


def test_alpaca_wording():
    without, with_input = _causal(
        [{"instruction": "Add.", "input": "", "output": "3"}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
    )
    assert without["completion"] == "3"
    assert "### Instruction:\nAdd.\n\n### Response:\n" in without["prompt"]
    assert "### Input:" not in without["prompt"]
    assert "### Input:\n1 2\n\n### Response:\n" in with_input["prompt"]


def test_alpaca_plain_and_chat():
    rows = [{"instruction": "Add.", "input": None, "output": "3"}]
    assert _causal(rows, prompt_template="plain") == [{"prompt": "Add.\n", "completion": "3"}]
    assert _causal(rows, chat=True, prompt_template="chat") == [
        {
            "prompt": [{"role": "user", "content": "Add."}],
            "completion": [{"role": "assistant", "content": "3"}],
        }
    ]


def test_messages_without_chat_template():
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(UserError, match="chat template"):
        _causal(rows)


def test_unusable_columns_are_named():
    with pytest.raises(UserError, match=r"It has: foo, bar\. Usable are: instruction \+ output"):
        _causal([{"foo": 1, "bar": 2}])


def _texts(rows: list[dict[str, Any]], **run: Any) -> Dataset:
    return classification_texts(Dataset.from_list(rows), RunArguments(**run), FLAG)


def test_text_columns():
    assert _texts([{"question": "q", "answer": "yes"}]).to_list() == [{"text": "q", "label": "yes"}]
    joined = _texts([{"instruction": "i", "input": "x", "output": "o", "answer": "true"}])
    assert joined.to_list() == [{"text": "i\nx", "label": "true"}]
    chosen = _texts([{"a": "t", "b": 3, "text": "no"}], text_column="a", label_column="b")
    assert chosen.to_list() == [{"text": "t", "label": "3"}]


def test_text_pattern_takes_the_first_group():
    rows = [{"instruction": "Please answer, question: is it?\n\nAnswer format: true/false", "answer": "true"}]
    assert _texts(rows, text_pattern=r"question: (.*?)\n")["text"] == ["is it?"]
    with pytest.raises(UserError, match="does not match"):
        _texts(rows, text_pattern="(nothing of the kind)")
    with pytest.raises(UserError, match="no group"):
        _texts(rows, text_pattern="question")
    with pytest.raises(UserError, match="no regular expression"):
        _texts(rows, text_pattern="(")


@pytest.mark.parametrize(
    ("rows", "run", "message"),
    [
        ([{"x": "t", "label": 1}], {}, "It has: x, label. Usable are: instruction, text"),
        ([{"text": "t", "y": 1}], {}, "It has: text, y. Usable are: label, answer"),
        ([{"text": "t", "label": 1}], {"text_column": "nope"}, "--text_column nope"),
        ([{"text": [7], "label": 1}], {}, "not text"),
        ([{"text": "t", "label": 0.5}], {}, "label 0.5 is no class"),
        ([{"text": "t", "label": None}], {}, "column 'label' is empty"),
    ],
)
def test_classification_columns(rows: list[dict[str, Any]], run: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        _texts(rows, **run)


def test_labels():
    rows = _texts([{"text": "a", "label": value} for value in ("b", "a", "b")])
    names = label_names(rows, FLAG)
    assert names == ["a", "b"]
    assert number_labels(rows, names, FLAG)["labels"] == [1, 0, 1]
    numbers = _texts([{"text": "a", "label": value} for value in (10, 9, 10)])
    assert label_names(numbers, FLAG) == ["9", "10"]
    with pytest.raises(UserError, match=r"labels that the training data lacks: c"):
        number_labels(_texts([{"text": "a", "label": "c"}]), names, FLAG)
    with pytest.raises(UserError, match="at least two classes"):
        label_names(_texts([{"text": "a", "label": "x"}]), FLAG)
