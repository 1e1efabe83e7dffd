"""Values, not column types: every layout judges an answer alike, and every complaint names the file and the line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.checks.errors import UserError
from launch.checks.flags import RunArguments
from launch.data.causal import causal_rows
from launch.data.classification import classification_texts
from launch.data.files import MAX_CHARACTERS
from launch.data.rows import load_rows
from launch.data.values import text_of
from tests.support.launch_support import CHAT_TEMPLATE, chat_tokenizer, values, write_jsonl

USER = {"role": "user", "content": "q"}
# Every layout as a function of the answer.
LAYOUTS: dict[str, Any] = {
    "alpaca": lambda a: {"instruction": "q", "output": a},
    "pairs": lambda a: {"prompt": "q", "completion": a},
    "chat pairs": lambda a: {"prompt": [USER], "completion": [{"role": "assistant", "content": a}]},
    "messages": lambda a: {"messages": [USER, {"role": "assistant", "content": a}]},
    "ShareGPT": lambda a: {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": a}]},
    "Sequence": lambda a: {"messages": {"role": ["user", "assistant"], "content": ["q", a]}},
    "messages as text": lambda a: {"messages": json.dumps([USER, {"role": "assistant", "content": a}])},
}
MISSING = [None, "", " \n", [], math.nan]
TEXTS = [("x", "x"), ("1e3", "1e3"), ("null", "null"), ('{"a": 1}', '{"a": 1}'), (5, "5"), (0.5, "0.5"), (True, "true")]


def read(path: Path, streaming: bool = False, **run: Any) -> list[dict[str, Any]]:
    flag = f"--dataset_name {path.name}"
    rows = load_rows(str(path), flag, "train", streaming=streaming)
    return list(causal_rows(rows, RunArguments(**run), flag, chat_tokenizer()))


def answer(row: dict[str, Any]) -> str:
    made = row["completion"]
    return made if isinstance(made, str) else made[-1]["content"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_layout_reads_the_same_texts(tmp_path: Path, layout: str, streaming: bool) -> None:
    """In one column: text that looks like JSON stays what it is, and numbers are the text that JSON writes."""
    path = write_jsonl(tmp_path / "rows.jsonl", [LAYOUTS[layout](value) for value, _ in TEXTS])
    assert [answer(row) for row in read(path, streaming)] == [text for _, text in TEXTS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_refuses_the_same_answers(tmp_path: Path, layout: str) -> None:
    for value in [*MISSING, {"a": 1}, [1]]:
        path = write_jsonl(tmp_path / "rows.jsonl", [LAYOUTS[layout]("x"), LAYOUTS[layout](value)])
        with pytest.raises(UserError, match=r"rows\.jsonl, line 2") as caught:
            read(path)
        assert ("is empty" in str(caught.value)) == (value in MISSING or value != value)


def test_missing_labels_and_texts_are_refused_alike() -> None:
    for value in MISSING:
        for row in ({"text": value, "label": "a"}, {"text": "t", "label": value}):
            rows = Dataset.from_list([{"text": "t", "label": "b"}]).to_list()
            raw = [{"place": f"f, line {i}", "row": json.dumps(r)} for i, r in enumerate([*rows, row])]
            with pytest.raises(UserError, match=r"f, line 1: column '(text|label)' is empty"):
                classification_texts(Dataset.from_list(raw), RunArguments(), "data")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(json_values, min_size=1, max_size=5), st.sampled_from(sorted(LAYOUTS)))
def test_whatever_stands_in_a_column_is_read_or_refused_with_its_row(column: list[Any], layout: str) -> None:
    raw = [{"place": f"f, line {i}", "row": json.dumps(LAYOUTS[layout](value))} for i, value in enumerate(column)]
    is_text = [isinstance(v, int | float) or (isinstance(v, str) and bool(v.strip())) for v in column]
    if all(is_text):
        made = causal_rows(Dataset.from_list(raw), RunArguments(), "data", chat_tokenizer())
        assert [answer(row) for row in made] == [v if isinstance(v, str) else json.dumps(v) for v in column]
    else:
        with pytest.raises(UserError, match=f"f, line {is_text.index(False)}"):
            causal_rows(Dataset.from_list(raw), RunArguments(), "data", chat_tokenizer())


def test_columns_whose_first_rows_are_null_and_files_with_other_columns(tmp_path: Path) -> None:
    """datasets' reader takes the type of a column from its first 10 MB, and of a folder from its first file."""
    filler = {"instruction": "q" * 1000, "input": None, "output": "a"}
    write_jsonl(tmp_path / "1.jsonl", [filler] * 11_000)
    write_jsonl(tmp_path / "2.jsonl", [{"instruction": "q", "input": "i", "output": "a", "more": [1]}, filler])
    for streaming in (False, True):
        rows = load_rows(str(tmp_path), "--dataset_name", "train", streaming=streaming)
        last = list(causal_rows(rows.skip(10_999), RunArguments(prompt_template="plain"), "data"))
        assert [row["prompt"] for row in last] == ["q" * 1000 + "\n", "q\ni\n", "q" * 1000 + "\n"]


def test_csv_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('prompt,completion\n"a, b",007\nNA,true\n"two\nlines",1.50\n')
    made = read(tmp_path / "x.csv")
    assert [(row["prompt"], row["completion"]) for row in made] == [
        ("a, b", "007"),
        ("NA", "true"),
        ("two\nlines", "1.50"),
    ]
    for text, message in (
        ("prompt,completion\na\n", "could not be read: line 2 has another number of values"),
        ("prompt,completion\na,b,c\n", "could not be read: line 2 has another number of values"),
        ('prompt,completion\n"a,b\n', "could not be read: unexpected end of data"),
        ("prompt,completion\na,\n", "line 2: column 'completion' is empty"),
        ("prompt,completion,completion\na,b,c\n", "line 1 names the column 'completion' twice"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.csv")


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    for text in ("one", "two"):
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": text}])
        assert [row["completion"] for row in read(path)] == [text]


ROW = '{"prompt": "q", "completion": "a"}\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            ROW.encode() * 2 + b'{"prompt": "caf\xe9"}\n',
            r"byte 85 \(line 3\) is b'\\xe9', which is not UTF-8",
        ),
        ("x.txt", "caf\u00e9".encode("latin-1"), r"x\.txt could not be read: byte 3 \(line 1\)"),
        ("x.csv", "a,b\n\u20ac,1\n".encode("cp1252"), r"byte 4 \(line 2\) is b'\\x80'"),
        ("x.json", "[1]".encode("utf-16"), r"byte 0 \(line 1\) is b'\\xff', which is not UTF-8.*-f utf-16"),
        ("x.jsonl", ROW.encode() + b"null\n", "line 2: the row is null"),
        ("x.jsonl", b"null\n" + ROW.encode(), "line 1: the row is null"),
        ("x.json", b"[null]", r"row 1 \(counted from 1\): the row is null"),
        ("x.jsonl", ROW.encode() + b"{", "line 2: the row cannot be read as JSON"),
        ("x.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1: the row cannot be read as JSON: maximum recursion depth"),
        (
            "x.jsonl",
            rb'{"prompt": "\ud800", "completion": "a"}',
            "line 1: the row cannot be read as JSON: .* surrogates not allowed",
        ),
        (
            "x.jsonl",
            b'{"prompt": "' + b"a" * 2_100_000 + b'"}',
            "the row has 2,100,014 characters",
        ),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, name: str, content: bytes, message: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, streaming)
    assert name in str(caught.value)


def test_a_row_of_20_megabytes_does_not_stall(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a " * 10_000_000, "completion": "b"}))
    started = time.monotonic()
    with pytest.raises(UserError, match="20,000,033 characters"):
        read(tmp_path / "x.jsonl")
    assert time.monotonic() - started < 20  # a minute and more where it is tokenised
    assert MAX_CHARACTERS < 20_000_000
    with pytest.raises(UserError, match="column 'a' has 2,100,000 characters, more than 2,000,000"):  # parquet, the hub
        text_of({"a": "a" * 2_100_000}, "a", "row 0")


def test_a_conversation_of_many_answers_does_not_stall(tmp_path: Path) -> None:
    """Each is a row with all before it: 20,000 of them would be a row's 600 kB two hundred million times."""
    turns = [USER, {"role": "assistant", "content": "a"}] * 20_000
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match=r"x.jsonl, line 1: the conversation has 40,000 messages and 20,000 answers"):
        read(path)
    assert len(read(write_jsonl(tmp_path / "y.jsonl", [{"messages": turns[:200]}]))) == 100


def test_a_template_that_refuses_a_row_names_it() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}" + (
        CHAT_TEMPLATE
    )
    system = {"role": "system", "content": "s"}
    rows = [{"messages": [USER, {"role": "assistant", "content": "a"}]},
            {"messages": [system, USER, {"role": "assistant", "content": "a"}]}]  # fmt: skip
    for data in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        with pytest.raises(UserError, match=r"data: row 1 .*the chat template refuses this conversation: No system!"):
            list(causal_rows(data, RunArguments(), "data", tokenizer))


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": "a", "tool_calls": 3}],
        [USER, {"role": "assistant", "content": "a", "tool_calls": [3]}],
        [USER, {"role": "assistant", "content": "a", "weight": []}],
        [USER, {"role": ["assistant"], "content": "a"}],
        {"role": ["user", "assistant"], "content": ["q"]},
    ],
)
def test_messages_of_another_shape_name_the_row(tmp_path: Path, messages: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [USER, {"role": "assistant", "content": "a"}]},
                                              {"messages": messages}])  # fmt: skip
    with pytest.raises(UserError, match=r"x\.jsonl, line 2"):
        read(path)


def test_content_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [USER, {"role": "assistant", "content": parts}]}])
    assert answer(read(path)[0]) == "ab"
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}])
    with pytest.raises(UserError, match="line 1, message 1: a part of the content is no text"):
        read(path)
    assert values(load_rows(str(path), "--dataset_name", "train"))[0]["messages"][0]["role"] == "user"
