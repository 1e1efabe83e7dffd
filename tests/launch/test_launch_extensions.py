"""DeepSpeed's extensions: what training does not use is not built, and a lock that a kill left keeps nobody waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.checks import extensions
from tests.support.launch_support import ROOT, launch_environment

COLLECTIVE = """
import deepspeed, torch
from launch.checks.extensions import skip_inference_collectives
skip_inference_collectives()
deepspeed.init_distributed("gloo", init_method="file://{}", rank=0, world_size=1)
print(deepspeed.comm.all_reduce(torch.ones(2)), deepspeed.comm.comm.cdb.shm_comm_op)
"""


def test_training_builds_no_collectives_for_inference(tmp_path: Path) -> None:
    """Not even where ninja, without which they cannot be built, is missing."""
    environment = {**launch_environment(), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), "PATH": os.defpath}
    code = COLLECTIVE.format(tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "None None"
    assert not (tmp_path / "built").exists()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "py311_cpu" / "op" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_young_lock_is_a_build(lock: Path) -> None:
    extensions.remove_abandoned_locks()
    assert lock.exists()


@pytest.mark.parametrize("seconds", [extensions.BUILDING_SECONDS + 1, -24 * 3600])
def test_an_abandoned_lock_is_removed(lock: Path, seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its date: the clock may have been ahead, or set back since."""
    age(lock, seconds)
    with lock.open():
        extensions.remove_abandoned_locks()
        assert lock.exists(), "somebody builds"
    extensions.remove_abandoned_locks()
    assert not lock.exists()
    assert str(lock) in capsys.readouterr().out


def test_an_abandoned_lock_of_a_finished_build_is_removed_soon(lock: Path) -> None:
    (lock.parent / "op.so").touch()
    age(lock, extensions.LOADING_SECONDS + 1)
    extensions.remove_abandoned_locks()
    assert not lock.exists()
