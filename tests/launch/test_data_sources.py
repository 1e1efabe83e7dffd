"""Layouts, column flags, several data sets, streams, and the count of what is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.errors import UserError
from launch.checks.flags import RunArguments
from launch.checks.preflight import preflight
from launch.data import sources
from launch.data.causal import causal_rows
from launch.data.rows import load_rows
from launch.training import modeling, trainers
from launch.training.processors import processor_of_run
from tests.support.launch_support import CHAT_TEMPLATE, chat_tokenizer, tiny_model, values, write_jsonl

TURNS = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), CHAT_TEMPLATE)


@pytest.fixture
def parse(model: Path, tmp_path: Path) -> Iterator[Any]:
    def arguments(names: list[Path], *flags: str) -> Arguments:
        return parse_arguments(
            ["--model_name_or_path", str(model), "--optim", "adamw_torch", "--report_to", "none", "--output_dir",
             str(tmp_path / "out"), "--num_experts", "2", "--dataset_name", *map(str, names), *flags], {}
        )  # fmt: skip

    yield arguments
    AcceleratorState._reset_state(reset_partial_state=True)


def converted(rows: list[dict[str, Any]], **run: Any) -> list[dict[str, Any]]:
    """The rows as read at once; those of a stream must be the same."""
    made, streamed = (
        list(causal_rows(data, RunArguments(**run), "data", chat_tokenizer()))
        for data in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows)))
    )
    assert made == streamed
    return made


def test_conversations_in_either_spelling_are_the_same() -> None:
    expected = [
        {"prompt": MESSAGES[:2], "completion": [MESSAGES[2]]},
        {"prompt": MESSAGES[:4], "completion": [MESSAGES[4]]},
    ]
    assert converted([{"messages": MESSAGES}]) == expected
    assert converted([{"conversations": SHAREGPT, "id": 3}]) == expected
    assert converted([{"talk": SHAREGPT, "text": "x"}], messages_column="talk") == expected


def test_text_is_a_completion_of_nothing_and_empty_text_is_left_out() -> None:
    rows = [{"text": "one"}, {"text": " \n"}, {"text": "two"}]
    expected = [{"prompt": "", "completion": "one"}, {"prompt": "", "completion": "two"}]
    assert converted(rows) == expected
    assert converted([{"t": row["text"], "text": "x"} for row in rows], text_column="t") == expected


def test_column_flags() -> None:
    rows = [{"q": "2 + 3", "a": "5", "instruction": "i", "output": "o"}]
    expected = [{"prompt": "2 + 3", "completion": "5"}]
    assert converted(rows, prompt_column="q", completion_column="a") == expected
    with pytest.raises(UserError, match="--prompt_column need --completion_column as well"):
        converted(rows, prompt_column="q")
    with pytest.raises(UserError, match="name columns of different layouts"):
        converted(rows, prompt_column="q", completion_column="a", text_column="instruction")
    with pytest.raises(UserError, match=r"--text_column nope: .* It has: q, a"):
        converted(rows, text_column="nope")


def test_a_streams_missing_value_is_found_when_it_is_read() -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}]
    stream = causal_rows(IterableDataset.from_generator(lambda: iter(rows)), RunArguments(), "data")
    with pytest.raises(UserError, match=r"data: row 1 \(counted from 0\): column 'completion' is empty"):
        list(stream)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_and_folders_on_disk(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n\nthree\n")
    text = load_rows(str(tmp_path / "notes.txt"), "--dataset_name", "train", streaming=streaming)
    assert [row["text"] for row in values(text)] == ["one\ntwo", "three\n"]
    rows = Dataset.from_list([{"prompt": "p", "completion": "c"}] * 3)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.take(2)).save_to_disk(tmp_path / "both")
    for name, split, count in (("one", "train", 3), ("both", "train", 3), ("both", None, 2)):
        found = load_rows(str(tmp_path / name), "--dataset_name", split, streaming=streaming)
        assert len(list(found)) == count
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        load_rows(str(tmp_path / "one"), "--dataset_name", "test")


def parts(sizes: list[int], streamed: bool) -> list[Any]:
    sets = [Dataset.from_dict({"prompt": [f"{n}" for _ in range(size)], "completion": [str(i) for i in range(size)]})
            for n, size in enumerate(sizes)]  # fmt: skip
    return [s.to_iterable_dataset() for s in sets] if streamed else sets


def drawn(mixed: Any) -> list[tuple[int, int]]:
    return [(int(row["prompt"]), int(row["completion"])) for row in mixed]


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), seed=st.integers(0, 5), streamed=st.booleans())
def test_without_weights_every_row_comes_once(sizes: list[int], seed: int, streamed: bool) -> None:
    mixed = drawn(sources.mix(parts(sizes, streamed), RunArguments(), seed))
    assert mixed == [(n, i) for n, size in enumerate(sizes) for i in range(size)]


@settings(max_examples=10, deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=3), seed=st.integers(0, 5), streamed=st.booleans())
def test_weighted_rows_keep_their_order_and_their_draws_depend_on_the_seed_alone(
    weights: list[float], seed: int, streamed: bool
) -> None:
    sizes = [20, 30, 25][: len(weights)]
    for stopping in ("first_exhausted", "all_exhausted"):
        run = RunArguments(dataset_weights=weights, dataset_stopping=stopping)
        mixed = drawn(sources.mix(parts(sizes, streamed), run, seed))
        assert mixed == drawn(sources.mix(parts(sizes, streamed), run, seed))
        for n, size in enumerate(sizes):
            own = [i for part, i in mixed if part == n]
            assert own == [i % size for i in range(len(own))]
            assert stopping == "first_exhausted" or len(own) >= size


def test_the_draws_follow_the_weights() -> None:
    run = RunArguments(dataset_weights=[3.0, 1.0])
    mixed = drawn(sources.mix(parts([6000, 2000], False), run, 0))
    share = sum(part == 0 for part, _ in mixed) / len(mixed)
    assert abs(share - 0.75) < 0.02  # four standard deviations of 8,000 draws


def test_evaluation_rows_are_set_aside_before_rows_are_drawn_twice(tmp_path: Path, parse: Any) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": f"{n}", "completion": str(i)} for i in range(size)])
             for n, size in enumerate((40, 8))]  # fmt: skip
    arguments = parse(files, "--eval_fraction", "0.25", "--dataset_weights", "1", "1", "--dataset_stopping",
                      "all_exhausted")  # fmt: skip
    train, evaluation, _ = sources.load_data(arguments, processor_of_run(arguments))
    left, right = drawn(train), drawn(evaluation)
    assert len(right) == 12
    assert len(left) > len(set(left)) == 36
    assert not set(left) & set(right)


def test_text_and_messages_cannot_be_mixed(tmp_path: Path, parse: Any) -> None:
    files = [write_jsonl(tmp_path / "m.jsonl", [{"messages": MESSAGES}]), tmp_path / "t.txt"]
    files[1].write_text("text")
    arguments = parse(files)
    with pytest.raises(UserError, match="chat messages and plain text"):
        sources.load_data(arguments, processor_of_run(arguments))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_weights", "1"], r"--dataset_weights has 1 value\(s\) for 2 data set"),
        (["--dataset_weights", "1", "0"], "--dataset_weights 0.0 must be above 0"),
        (["--dataset_stopping", "all_exhausted"], "no effect without --dataset_weights"),
        (["--streaming"], "--streaming needs --max_steps"),
        (["--streaming", "--max_steps", "3", "--eval_fraction", "0.5"], "--eval_fraction 0.5 needs all rows"),
        (["--streaming", "--max_steps", "3", "--dataloader_num_workers", "2"], "--dataloader_num_workers 2"),
        (["--streaming", "--max_steps", "1", "--task", "sequence-classification"], "--streaming has no effect"),
    ],
)
def test_settings_that_cannot_be(flags: list[str], message: str, parse: Any) -> None:
    with pytest.raises(UserError, match=message):
        preflight(parse([Path("a"), Path("b")], *flags))


def trainer_of(arguments: Arguments) -> Any:
    arguments.training.start()
    tokenizer = processor_of_run(arguments)
    train, _, _ = sources.load_data(arguments, tokenizer)
    config = modeling.adapter_config(arguments.adapter, arguments.run.task)
    return trainers.build_trainer(
        arguments, modeling.load_model(arguments, config, {}, tokenizer), tokenizer, train, None, []
    )


@pytest.mark.parametrize("flags", [[], ["--streaming", "--max_steps", "1"], ["--packing"]])
def test_what_is_cut_is_counted(tmp_path: Path, parse: Any, flags: list[str]) -> None:
    sizes = [(2, 3), (5, 5), (9, 4), (10, 1), (30, 2), (4, 40)]  # bytes of prompt and completion
    rows = [{"prompt": "p" * p, "completion": "c" * c} for p, c in sizes]
    trainer = trainer_of(parse([write_jsonl(tmp_path / "rows.jsonl", rows)], "--max_length", "10", *flags))
    count, list_of_rows = trainer.truncation["train"], list(trainer.train_dataset)
    if "--streaming" in flags:  # what asking for the first row has read was counted, too
        count.rows = count.tokens = count.rows_cut = count.rows_dropped = count.tokens_cut = 0
        list_of_rows = list(trainer.train_dataset)
    lengths = [p + c + 1 for p, c in sizes]  # and the end of the sequence
    kept = sum(min(n, 10) for n, (p, _) in zip(lengths, sizes, strict=True) if p < 10)
    assert (count.rows, count.tokens) == (6, sum(lengths))
    assert (count.rows_cut, count.rows_dropped) == (5, 2)
    assert count.tokens_cut == sum(lengths) - kept
    assert sum(len(row["input_ids"]) for row in list_of_rows) == kept
    assert f"{count.tokens_cut} of {sum(lengths)} tokens are cut, and 2 rows" in count.report("train")


def test_what_is_cut_from_texts_of_classes_is_counted(tmp_path: Path, parse: Any) -> None:
    rows = [{"text": "t" * n, "label": n % 2} for n in (3, 8, 9, 20)]
    flags = "--task", "sequence-classification", "--max_length", "8"
    count = trainer_of(parse([write_jsonl(tmp_path / "rows.jsonl", rows)], *flags)).truncation["train"]
    assert (count.rows, count.tokens, count.rows_cut, count.tokens_cut, count.rows_dropped) == (4, 40, 2, 13, 0)
