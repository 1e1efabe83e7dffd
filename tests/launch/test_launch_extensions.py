"""Locks of extension builds: none is left behind by a kill, and an abandoned one is found."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launch.checks import extensions
from launch.checks.errors import UserError


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "py311_cpu" / "op" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def age(path: Path, minutes: float) -> None:
    then = time.time() - 60 * minutes
    os.utime(path, (then, then))


def test_a_young_lock_is_a_build(lock: Path):
    extensions.check_build_lock()


def test_an_abandoned_lock_is_named(lock: Path):
    age(lock, extensions.ABANDONED_MINUTES + 1)
    with pytest.raises(UserError, match="Remove that file") as caught:
        extensions.check_build_lock()
    assert str(lock) in str(caught.value)


def test_an_abandoned_lock_of_a_finished_build_is_removed(lock: Path):
    (lock.parent / "op.so").touch()
    age(lock, 0.2)
    with lock.open():
        extensions.check_build_lock()
        assert lock.exists(), "somebody is loading it"
    extensions.check_build_lock()
    assert not lock.exists()


def test_a_lock_from_the_future_is_judged_by_its_owner(lock: Path):
    age(lock, -24 * 60)
    with lock.open():
        extensions.check_build_lock()
    with pytest.raises(UserError, match=r"dated in the future.*Remove that file"):
        extensions.check_build_lock()
    (lock.parent / "op.so").touch()
    extensions.check_build_lock()
    assert not lock.exists()


def test_a_held_lock_is_a_build_until_it_is_too_old(lock: Path):
    with lock.open():
        age(lock, extensions.ABANDONED_MINUTES + 1)
        extensions.check_build_lock()
        age(lock, extensions.STALE_MINUTES + 1)
        with pytest.raises(UserError, match="Remove that file"):
            extensions.check_build_lock()


def test_a_kill_while_loading_leaves_no_lock(lock: Path, monkeypatch: pytest.MonkeyPatch):
    class Builder:
        NAME = "op"

        def load(self) -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                lock.unlink()  # as torch does

    class Accelerator:
        def create_op_builder(self, name: str) -> Builder:
            return Builder()

    monkeypatch.setattr(extensions, "get_accelerator", Accelerator)
    monkeypatch.setitem(extensions.deepspeed.ops.__compatible_ops__, "op", True)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        extensions.load_collectives()
    assert caught.value.code == 128 + signal.SIGTERM
    assert not lock.exists()
    assert signal.getsignal(signal.SIGTERM) is before
