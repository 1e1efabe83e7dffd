"""One run a folder: who holds the lock, who may take it over, what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.checkpoint.lock import NAME, OutputLock, read
from launch.checks.errors import UserError
from launch.cluster.processes import identity, is_gone
from tests.support.launch_support import ROOT

HOLDER = "import sys, time; from launch.checkpoint.lock import OutputLock; OutputLock(sys.argv[1]).take(); "


def start(folder: Path, then: str) -> subprocess.Popen[str]:
    """A process that takes the lock, says so, and does something else."""
    code = f"{HOLDER}print('taken', flush=True); {then}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_the_second_is_refused_as_long_as_the_first_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(tmp_path, "time.sleep(600)")
    try:
        with pytest.raises(UserError, match=rf"in use by another run \(process {first.pid} on .* sign") as caught:
            OutputLock(tmp_path).take()
        assert "choose another --output_dir" in str(caught.value)
        for moved in (-86400, 86400):  # judged by its owner, whatever the file's date
            os.utime(tmp_path / NAME, (time.time() + moved,) * 2)
            with pytest.raises(UserError, match="in use"):
                OutputLock(tmp_path).take()
        first.send_signal(signal.SIGSTOP)  # stopped is not dead
        with pytest.raises(UserError, match="in use"):
            OutputLock(tmp_path).take()
    finally:
        first.kill()
        first.wait()
    os.utime(tmp_path / NAME, (time.time() + 86400,) * 2)
    second = OutputLock(tmp_path)
    second.take()
    assert f"process {first.pid}" in capsys.readouterr().out
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_gives_the_folder_free(tmp_path: Path) -> None:
    assert start(tmp_path, "").wait() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["host", "boot", "pids"])
def test_nobody_is_declared_dead_from_afar(name: str, tmp_path: Path) -> None:
    """Another host, another boot of a host of this name, another container: it may live."""
    holder = {**identity(), "pid": 1 << 22, name: "another", "id": "x", "since": "yesterday"}
    (tmp_path / NAME).write_text(json.dumps(holder))
    os.utime(tmp_path / NAME, (0, 0))
    with pytest.raises(UserError, match=rf"cannot be told from here.*remove {tmp_path / NAME}"):
        OutputLock(tmp_path).take()
    assert read(tmp_path / NAME) == holder


def test_a_number_used_again_is_not_the_same_process() -> None:
    mine = identity()
    assert not is_gone(mine)
    assert is_gone({**mine, "started": "1"})
    assert is_gone({**mine, "pid": 1 << 22})
    assert not is_gone({})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_lock_that_says_nothing_is_respected(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match="remove"):
        OutputLock(tmp_path).take()


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    for _ in range(3):
        dead = start(tmp_path, "time.sleep(600)")
        dead.kill()
        dead.wait()
        code = """
from launch.checks.errors import UserError
try:
    OutputLock(sys.argv[1]).take()
    print("took it", flush=True)
    sys.stdin.readline()
except UserError as error:
    print("refused", flush=True)
"""
        code = "import sys\nfrom launch.checkpoint.lock import OutputLock\n" + code
        rivals = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        said = []
        for rival in rivals:
            line = ""
            while not line.startswith(("took", "refused")):
                assert rival.stdout is not None
                line = rival.stdout.readline()
                assert line
            said.append(line.strip())
        assert sorted(said) == ["refused", "refused", "took it"]
        for rival in rivals:
            rival.communicate("\n")
        assert list(tmp_path.iterdir()) == []
