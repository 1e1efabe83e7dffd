"""Which checkpoint a run goes on from, and which ones rotation may delete: with files alone, without training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.checkpoint.manifest import MANIFEST, write_manifest
from launch.checkpoint.resume import check_output_dir, checkpoints, choose_checkpoint, fault, newest_complete, step_of
from launch.checkpoint.saving import rotate
from launch.checks.errors import UserError
from tests.support.launch_support import STATE, save_checkpoint


def change_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a file cut short": lambda folder: (folder / "inside" / "data").write_bytes(b"abc"),
    "a file gone": lambda folder: (folder / "inside" / "data").unlink(),
    "no trainer state": lambda folder: (folder / "trainer_state.json").unlink(),
    "a broken manifest": lambda folder: (folder / MANIFEST).write_text('{"format": 3, "files": {"x"'),
    "a manifest of something else": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a manifest that leaves the folder": lambda folder: write_manifest(
        folder, {**STATE, "files": {"../x": {"size": 0, "sha256": ""}}}
    ),
    "a tensor in no file": lambda folder: write_manifest(folder, {**STATE, "tensors": {"x|weight": "gone"}}),
    "the adapter alone": lambda folder: write_manifest(folder, {}),  # as with --save_only_model
    "a bit changed": lambda folder: change_bit(folder / "inside" / "data"),
}


def arguments(output_dir: Path, wish: str | None) -> Any:
    training = SimpleNamespace(output_dir=str(output_dir), resume_from_checkpoint=wish, process_index=0)
    return SimpleNamespace(
        training=training,
        run=SimpleNamespace(overwrite_output_dir=False),
        adapter=SimpleNamespace(ep_size=1),
    )


def chosen(output_dir: Path, wish: str | None = "auto") -> str | None:
    """What the checks before and after the start of torch.distributed make of `--resume_from_checkpoint`."""
    settled = arguments(output_dir, wish)
    check_output_dir(settled)
    choose_checkpoint(settled)
    return settled.training.resume_from_checkpoint


@pytest.mark.parametrize("damage", DAMAGE)
def test_auto_passes_over_what_is_damaged(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = save_checkpoint(tmp_path, 9), save_checkpoint(tmp_path, 10)
    assert chosen(tmp_path) == str(newer)
    DAMAGE[damage](newer)
    capsys.readouterr()
    assert chosen(tmp_path) == str(older)
    said = capsys.readouterr().out
    assert f"{newer} is passed over" in said
    assert f"going on from {older}" in said
    for wish in ("true", str(newer)):
        with pytest.raises(UserError, match="checkpoint-10"):
            chosen(tmp_path, wish)


def test_auto_starts_anew_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen(tmp_path / "not there") is None
    (tmp_path / "notes.txt").write_text("mine")
    assert chosen(tmp_path) is None, "other files in the folder are no obstacle"
    assert "starting anew" in capsys.readouterr().out
    DAMAGE["a file gone"](save_checkpoint(tmp_path, 3))
    assert chosen(tmp_path) is None
    with pytest.raises(UserError, match="--resume_from_checkpoint auto"):
        chosen(tmp_path, None)


@given(ranks=st.integers(1, 9), bits=st.integers(0, 199 * 8))
@settings(max_examples=20, deadline=None)
def test_one_rank_finds_a_changed_bit(ranks: int, bits: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(Path(folder), 1)
        assert [fault(checkpoint, share=(rank, ranks)) for rank in range(ranks)] == [None] * ranks
        path = checkpoint / "inside" / "data"
        data = bytearray(path.read_bytes())
        data[bits // 8] ^= 1 << bits % 8
        path.write_bytes(bytes(data))
        assert fault(checkpoint) is None, "sizes do not tell"
        faults = [fault(checkpoint, share=(rank, ranks)) for rank in range(ranks)]
        assert [said is not None for said in faults].count(True) == 1
        assert str(path) in next(filter(None, faults))


@given(
    steps=st.sets(st.integers(1, 30), max_size=8),
    newest=st.integers(1, 30),
    limit=st.none() | st.integers(-1, 5),
    best=st.none() | st.integers(1, 30),
)
@settings(max_examples=100, deadline=None)
def test_rotation_keeps_what_was_just_saved(steps: set[int], newest: int, limit: int | None, best: int | None) -> None:
    """Whatever else lies in the folder, damaged or with higher numbers: the new one, complete, stays; the best, too."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / ".partial").mkdir()
        for step in steps:
            (root / f"checkpoint-{step}").mkdir(exist_ok=True)  # without a manifest or anything in it
        saved = save_checkpoint(root, newest) if newest not in steps else root / f"checkpoint-{newest}"
        path = str(root / f"checkpoint-{best}") if best in steps | {newest} else None
        rotate(saved, limit, path)
        left = [step_of(path) for path in checkpoints(root)]
        assert newest in left
        if newest not in steps:
            assert newest_complete(root) == saved
        assert path is None or best in left
        if limit and limit > 0:
            protected = {newest} | ({best} if path else set())
            assert len(left) == min(max(limit, len(protected)), len(steps | {newest}))
            older = sorted((step for step in steps - protected if step < newest), reverse=True)
            kept = [step for step in left if step in older]
            assert kept == older[: len(kept)], "the oldest go first"
        else:
            assert set(left) == steps | {newest}
