"""The demo's parts: text, tokenizer, cache. (`make demo` is the whole of it.)"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from filelock import FileLock

from launch.demo import base as demo_base
from launch.demo import defaults as demo
from launch.demo import tasks as demo_tasks


def test_skills_answer_correctly():
    examples = {skill: demo_tasks.skill_lines(skill, 20, "seed") for skill in demo_tasks.SKILLS}
    for prompt, answer in examples["reverse"]:
        assert prompt == f"rev:{answer[::-1]}="
    for prompt, answer in examples["upper case"]:
        assert prompt == f"upp:{answer.lower()}="
    for prompt, answer in examples["sort letters"]:
        assert list(answer) == sorted(prompt[4:-1])
    for prompt, answer in examples["next letter"]:
        assert [(ord(b) - ord(a)) % 26 for a, b in zip(prompt[4:-1], answer, strict=True)] == [
            1
        ] * demo_tasks.WORD_LENGTH
    for prompt, answer in examples["pick n-th"]:
        assert answer == prompt[4:-2][int(prompt[-2]) - 1]
    for prompt, answer in examples["mirror a-z"]:
        assert all(ord(a) + ord(b) == ord("a") + ord("z") for a, b in zip(prompt[4:-1], answer, strict=True))


def test_held_out_lines_are_not_trained_on():
    training, held_out = demo_tasks.split_lines(200, 30, seed=1)
    assert len(training) == 200 * len(demo_tasks.SKILLS)
    assert set(held_out) == set(demo_tasks.SKILLS)
    for lines in held_out.values():
        assert len(lines) == 30
        assert not set(lines) & set(training)
    assert demo_tasks.split_lines(200, 30, seed=1) == (training, held_out)
    assert demo_tasks.split_lines(200, 30, seed=2) != (training, held_out)


def test_pretraining_shows_no_skill():
    rng = random.Random(0)
    names = {demo_tasks.pretraining_line(rng)[0].split(":")[0] for _ in range(500)}
    skills = {demo_tasks.skill_lines(skill, 1, "s")[0][0].split(":")[0] for skill in demo_tasks.SKILLS}
    assert len(names) == 6
    assert not names & skills


def test_tokenizer_is_one_token_per_byte():
    tokenizer = demo_base.byte_tokenizer()
    text = "say:aZ09=\n é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_base_model_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_base, "STEPS", 2)
    folder = demo_base.base_model()
    assert folder.parent == tmp_path / "ds_moelora"
    assert (folder / "model.safetensors").is_file()
    monkeypatch.setattr(demo_base, "_pretrain", lambda _: pytest.fail("built again"))
    assert demo_base.base_model() == folder


def test_a_build_that_another_process_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_base, "WAIT_SECONDS", 0.1)
    folder = demo_base.cache_folder()
    folder.parent.mkdir()
    with FileLock(f"{folder}.lock"), pytest.raises(ValueError, match="another process has not built"):
        demo_base.base_model()


def test_demo_rows_fit():
    rows = demo.dataset(seed=0)
    longest = max(len(p) + len(c) for p, c in zip(rows["prompt"], rows["completion"], strict=True))
    assert longest < demo.DEFAULTS["max_length"]
