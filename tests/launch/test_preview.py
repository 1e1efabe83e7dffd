"""The preview shows what the trainer trains, marked as the loss covers it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.cli import main
from launch.data import preview
from launch.demo.base import byte_tokenizer
from tests.support import layout_examples as examples
from tests.support.forks import run_script, start_forked
from tests.support.launch_support import ROOT, launch_environment


def test_the_previews_in_the_docs_are_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    shown = text.split(examples.MARKS[0])[1].split(examples.MARKS[1])[0]
    assert shown.strip() == examples.as_markdown().strip(), "run python -m tests.support.layout_examples docs/data.md"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.integers(0, 5))
def test_every_token_is_shown_once_under_its_own_mark(tokens: list[tuple[bool, bool]], padding: int) -> None:
    """`tokens`: whether each is trained, and whether a packed row begins with it."""
    ids = torch.arange(2, 2 + len(tokens) + padding)
    labels = torch.where(torch.tensor([trained for trained, _ in tokens] + [False] * padding), ids, -100)
    real = torch.tensor([1] * len(tokens) + [0] * padding)
    starts = [0] + [i for i, (_, start) in enumerate(tokens) if start and i]
    batch = {"input_ids": ids[None], "labels": labels[None]}
    if padding:
        batch["attention_mask"] = real[None]
    else:
        positions = torch.arange(len(tokens))
        batch["position_ids"] = torch.stack([i - max(s for s in starts if s <= i) for i in positions])[None]
    shown, boundaries = [], 0
    for kind, words in preview.spans(batch, 0):
        boundaries += kind is None
        shown += [(token, kind) for token in words]
    assert [token for token, _ in shown] == ids[: len(tokens)].tolist()
    assert [kind for _, kind in shown][1:] == [trained for trained, _ in tokens][1:]
    assert not shown[0][1]  # nothing predicts the first token
    assert boundaries == (0 if padding else len(starts) - 1)


def test_colours_and_brackets_mark_the_same() -> None:
    tokenizer = byte_tokenizer()
    ids = torch.tensor(tokenizer("ask: tell")["input_ids"])
    labels = torch.cat([torch.full((5,), -100), ids[5:]])
    batch = {"input_ids": ids[None], "labels": labels[None]}
    assert preview.render(batch, 0, tokenizer, color=False).plain == "ask: [[tell]]"
    colored = preview.render(batch, 0, tokenizer, color=True)
    assert colored.plain == "ask: tell"
    assert [(span.start, span.end, span.style) for span in colored.spans] == [
        (0, 5, preview.READ),
        (5, 9, preview.TRAINED),
    ]


def test_the_command(tmp_path: Path) -> None:
    """What `python -m ds_moelora preview` starts, into a file."""
    examples.write_examples(tmp_path)
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "pairs.csv")]
    log = tmp_path / "log"
    process = start_forked(run_script, preview.__file__, [*words, "--rows", "2"], launch_environment(), str(log))
    process.join(300)
    printed = log.read_text()
    assert process.exitcode == 0, printed
    assert preview.LEGEND in printed
    assert "Three primes: [[2, 3, 5<eos>]]" in printed
    assert "2 + 3 = [[5<eos>]]" in printed


def test_the_command_hands_flags_and_exit_code_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command) or SimpleNamespace(returncode=7))
    assert main(["preview", "--rows", "3", "--dataset_name", "a", "b", "--packing"]) == 7
    assert Path(calls[0][1]) == Path(preview.__file__)
    assert calls[0][2:] == ["--rows", "3", "--dataset_name", "a", "b", "--packing"]
    with pytest.raises(SystemExit):
        main(["plan", "--dataset_name", "a"])


def test_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preview.main(["--rows", "0"])
    assert "--rows 0 must be at least 1" in capsys.readouterr().err
