"""Processes that read different data are told before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from launch.checks.errors import UserError
from launch.cluster import agreement
from launch.cluster.agreement import check_same_data, fingerprint
from tests.support.launch_support import alpaca_rows, write_jsonl


def gathered_with(monkeypatch: pytest.MonkeyPatch, others: list[Any]) -> None:
    """This process is rank 0; the others have read `others`."""

    def all_gather_object(into: list[Any], mine: Any) -> None:
        theirs = [(f"host{n}", {flag: fingerprint(rows) for flag in mine[1]}) for n, rows in enumerate(others, 1)]
        into[:] = [("host0", mine[1]), *theirs]

    monkeypatch.setattr(agreement.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(agreement.dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(agreement.dist, "all_gather_object", all_gather_object)


def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = alpaca_rows(16)
    mine = Dataset.from_list(rows)
    gathered_with(monkeypatch, [Dataset.from_list(rows), mine])
    check_same_data({"--dataset_name": mine})
    changed = Dataset.from_list([*rows[:-1], {**rows[-1], "output": "stale"}])
    gathered_with(monkeypatch, [mine, Dataset.from_list(rows[:12]), changed])
    expected = (
        r"--dataset_name: .*Rank 0 on host0 has 16 rows; rank 2 on host2 has 12 rows, "
        r"rank 3 on host3 has 16 rows with other content\. Bring"
    )
    with pytest.raises(UserError, match=expected):
        check_same_data({"--dataset_name": mine})


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.text(max_size=5), min_size=1, max_size=30), data=st.data())
def test_any_change_is_seen(rows: list[str], data: st.DataObject) -> None:
    """One row changed, dropped, added, or two that differ exchanged."""
    place = data.draw(st.integers(0, len(rows) - 1))
    others = [
        [*rows[:place], rows[place] + "x", *rows[place + 1 :]],
        [*rows[:place], *rows[place + 1 :]],
        [*rows, ""],
    ]
    if rows[0] != rows[place]:
        others.append([rows[place], *rows[1:place], rows[0], *rows[place + 1 :]])
    mine = fingerprint(Dataset.from_dict({"text": rows}))
    assert mine == fingerprint(Dataset.from_dict({"text": list(rows)}))
    for other in others:
        assert fingerprint(Dataset.from_dict({"text": other})) != mine


def test_where_a_copy_lies_makes_no_difference(tmp_path: Path) -> None:
    prints = []
    for host in ("one", "two"):
        folder = tmp_path / host
        folder.mkdir()
        Picture.new("RGB", (4, 4)).save(folder / "a.png")
        data = Dataset.from_dict({"image": [str(folder / "a.png")], "label": [1]}).cast_column("image", Image())
        file = write_jsonl(folder / "rows.jsonl", alpaca_rows(20))
        read = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
        stream = load_dataset("json", data_files=str(file), split="train", streaming=True)
        prints.append((fingerprint(data), fingerprint(read.select(range(5, 15))), fingerprint(stream)))
    assert prints[0] == prints[1]


def test_large_data_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"text": [str(n) for n in range(1000)]})
    whole = fingerprint(rows)
    monkeypatch.setattr(agreement, "MAX_ROWS", 10)
    assert fingerprint(rows)[0] == 1000
    assert fingerprint(rows) != whole
    assert fingerprint(rows) != fingerprint(rows.select(range(999, -1, -1)))


def test_nothing_to_compare() -> None:
    assert fingerprint(None) == (0, "")
    check_same_data({"--dataset_name": Dataset.from_dict({"a": [1]})})  # one process
