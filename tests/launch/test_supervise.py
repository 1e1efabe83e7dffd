"""launch/supervise.sh over commands that end as they are told to, without any training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch_support import ROOT

SUPERVISE = ROOT / "launch" / "supervise.sh"
# Attempt number n does the n-th line of the script: writes its first words to the status file, ends with the last.
COMMAND = """
import os, signal, sys, time
folder, status = sys.argv[1], sys.argv[sys.argv.index("--status_file") + 1]
attempt = len(os.listdir(folder))
open(os.path.join(folder, str(attempt)), "w").close()
*words, code = sys.argv[2].split(";")[attempt].split()
open(status, "a").write(" ".join(words).replace("PID", str(os.getpid())).replace(",", "\\n") + "\\n")
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (open(status, "a").write("preempted 7\\n"), os._exit(0)))
    print("ready", flush=True)
    time.sleep(60)
sys.exit(int(code))
"""


def supervise(tmp_path: Path, script: str, *flags: str) -> tuple[int, int, str]:
    """(exit code, attempts, what was said) of a command that does `script`."""
    attempts = tmp_path / "a folder's name"
    attempts.mkdir()
    command = [str(SUPERVISE), "--pause", "0", *flags, sys.executable, "-c", COMMAND, str(attempts), script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return finished.returncode, len(list(attempts.iterdir())), finished.stderr


@pytest.mark.parametrize(
    ("script", "flags", "code", "attempts"),
    [
        ("finished 8 0", [], 0, 1),
        ("preempted 3 0", [], 0, 1),
        ("preempted 3 1", [], 0, 1),  # DeepSpeed's launcher ends with 1 after SIGTERM, whatever its ranks do
        ("2", [], 2, 1),
        ("checkpoint 2 1;checkpoint 4 247;finished 8 0", [], 0, 3),
        ("1;1;1;1", [], 1, 3),
        ("checkpoint 2 1;1;checkpoint 2 1;1", [], 1, 3),
        ("1;1;1;1;finished 8 0", ["--stuck", "0"], 0, 5),
        ("checkpoint 2 1;checkpoint 4 7;finished 8 0", ["--restarts", "1"], 7, 2),
        ("0;finished 8 0", [], 0, 2),  # an exit code of 0 alone proves nothing
    ],
)
def test_ends_and_restarts(tmp_path: Path, script: str, flags: list[str], code: int, attempts: int) -> None:
    assert supervise(tmp_path, script, *flags)[:2] == (code, attempts)


@pytest.mark.parametrize("flags", [["--restarts", "few"], ["--quick"], []])
def test_wrong_flags(flags: list[str]) -> None:
    finished = subprocess.run([str(SUPERVISE), *flags], capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 2
    assert "supervise: " in finished.stderr


def test_its_own_places_come_first(tmp_path: Path) -> None:
    """Without a status file, or a command, nothing is started whose end could not be learnt."""
    ran = tmp_path / "ran"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "nowhere")}
    for command, variables, code in ((["touch", str(ran)], environment, 1), ([str(tmp_path / "absent")], None, 2)):
        finished = subprocess.run(
            [str(SUPERVISE), "--pause", "0", *command], capture_output=True, text=True, check=False, env=variables
        )
        assert finished.returncode == code, finished.stderr
        assert "nothing was started" in finished.stderr.lower()
    assert not ran.exists()


@pytest.mark.parametrize("started", [f"started PID {os.uname().nodename}", "started 1 elsewhere"])
def test_sigterm_is_passed_on(tmp_path: Path, started: str) -> None:
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    command = [str(SUPERVISE), sys.executable, "-c", COMMAND, str(attempts), f"{started} wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert ("passed on to rank 0" in said) == ("PID" in started)
    assert "saved after step 7" in said


def test_shellcheck() -> None:
    try:
        found = subprocess.run(["shellcheck", str(SUPERVISE)], capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("needs shellcheck (apt-get install shellcheck)")
    assert found.returncode == 0, found.stdout
