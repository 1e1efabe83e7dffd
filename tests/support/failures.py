"""Runs of the launcher that fail: started, watched from outside, and checked to have left nothing behind."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from launch.checkpoint.resume import newest_complete, step_of
from tests.support.forks import ROOT, Host, run_ranks, start_forked
from tests.support.launch_support import (
    TRAIN,
    alpaca_rows,
    assert_same_adapter,
    find_free_port,
    launch_environment,
    tiny_model,
    write_jsonl,
)

STEPS, SAVE_STEPS = 18, 2
SETTINGS = ["--deepspeed", "configs/zero2.json", "--lora_r", "2", "--num_experts", "2", "--top_k", "1", "--seed", "3",
            "--learning_rate", "1e-3", "--logging_steps", "1", "--max_steps", str(STEPS),
            "--save_steps", str(SAVE_STEPS), "--report_to", "none", "--resume_from_checkpoint", "auto"]  # fmt: skip
BATCH = ["--per_device_train_batch_size", "2"]
MARK = "DS_MOELORA_TEST_RUN"  # in the environment of a run's processes, and of nobody else's
FAULTY = ROOT / "tests" / "support" / "faulty_train.py"


class Run:
    """A command with ranks somewhere below it, in a session of its own; its output goes to a file.

    Args:
        command: what to start, in the repository's root.
        log: where its output goes.
        environment: added to that of this process.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**launch_environment(), MARK: self.mark, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def code(self) -> int | None:
        """The exit code; None while the command runs."""
        return self.process.poll()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> dict[int, str | None]:
        """{pid: its RANK, or None} of everything alive that the run has started."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                dead = (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except OSError:
                continue  # ended meanwhile
            if f"{MARK}={self.mark}".encode() in environment and not dead:
                ranks = [item[5:].decode() for item in environment if item.startswith(b"RANK=")]
                found[int(entry.name)] = ranks[0] if ranks else None
        return found

    def rank(self, number: int) -> int:
        """The pid of a rank: the oldest process with its number (younger ones are its children)."""
        return min(pid for pid, rank in self.processes().items() if rank == str(number))

    def parent(self, pid: int) -> int:
        """The pid of a process's parent."""
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def wait_for(self, pattern: str, timeout: float = 600.0) -> None:
        """Waits until the output has a match of `pattern`."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output):
            assert self.code() is None, f"ended before {pattern!r} was seen:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"{pattern!r} was not seen in {timeout} s:\n{self.output[-4000:]}"
            time.sleep(0.05)

    def finish(self, timeout: float = 600.0) -> int:
        """The exit code, when the command and everything that it has started have ended.

        Raises:
            AssertionError: something still runs after `timeout` seconds (it is ended then).
        """
        deadline = time.monotonic() + timeout
        while self.code() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.end()
        code = self.code()
        assert not left, f"still running after {timeout} s: {left}\n{self.output[-4000:]}"
        assert code is not None
        return code

    def end(self) -> dict[int, str | None]:
        """Ends what still runs, and returns it."""
        left = self.processes()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return left


class ForkedRun(Run):
    """A run of the launcher whose ranks are forked with their imports done (`tests.support.forks`).

    Args:
        arguments: of the script.
        log: where the output goes.
        environment: added to that of this process.
        ranks: how many.
        script: what every rank runs.
        port: of the rendezvous, which several hosts share; None: a free one.
        host: where the ranks are, if not all of the run are on this machine.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        ranks: int = 2,
        script: Path = TRAIN,
        port: int | None = None,
        host: Host | None = None,
    ) -> None:
        self.log = log
        log.write_text("")
        variables = {**launch_environment(), **(environment or {})}
        words = str(script), arguments, ranks, variables, port or find_free_port(), str(log), host
        self.forked = start_forked(run_ranks, *words, daemon=False)

    def code(self) -> int | None:
        return self.forked.exitcode

    def processes(self) -> dict[int, str | None]:
        """{pid: its rank, or None} of everything alive in the run's session."""
        pids = Path(f"{self.log}.pids")
        ranks = [int(pid) for pid in pids.read_text().split()] if pids.is_file() else []
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue  # ended meanwhile
            if int(session) == self.forked.pid and state not in "ZX":
                pid = int(entry.name)
                found[pid] = str(ranks.index(pid)) if pid in ranks else None
        return found

    def end(self) -> dict[int, str | None]:
        left = super().end()
        self.forked.kill()
        self.forked.join()
        return left


def deepspeed_command(arguments: list[str]) -> list[str]:
    """The launcher with two processes, on a free port."""
    return ["deepspeed", "--master_port", str(find_free_port()), "--num_gpus", "2", str(TRAIN), *arguments]


def losses_of(checkpoint: Path) -> list[float]:
    """The loss of every step up to a checkpoint, as the run has logged it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def errors_in(output: str) -> dict[str, str]:
    """{rank: its error message} in a run's output."""
    return dict(re.findall(r"\[rank (\d+)\] error: (.*)", output))


@dataclass
class Setting:
    """What all attempts share, and the run that nothing happens to."""

    arguments: list[str]
    reference: Path

    def losses(self) -> list[float]:
        return losses_of(self.reference / f"checkpoint-{STEPS}")


@functools.cache
def undisturbed_run(root: Path) -> Setting:
    """The setting of all tests of failures, and its reference run; once per session, of which `root` is the folder."""
    folder = root / "undisturbed"
    folder.mkdir()
    model = tiny_model(folder / "model")
    # 28 rows: the run ends in its third epoch.
    data = write_jsonl(folder / "rows.jsonl", alpaca_rows(28))
    arguments = [*SETTINGS, "--model_name_or_path", str(model), "--dataset_name", str(data)]
    reference = folder / "reference"
    keep_all = ["--save_total_limit", str(STEPS)]
    run = ForkedRun([*arguments, *BATCH, *keep_all, "--output_dir", str(reference)], folder / "reference.log")
    assert run.finish() == 0, run.output[-4000:]
    return Setting(arguments, reference)


def equal_so_far(setting: Setting, output_dir: Path) -> int:
    """Asserts that the newest complete checkpoint has the undisturbed run's losses, to the bit; returns its step."""
    newest = newest_complete(output_dir)
    assert newest is not None
    losses = losses_of(newest)
    assert losses == setting.losses()[: step_of(newest)]
    return step_of(newest)


def check_end(setting: Setting, output_dir: Path) -> None:
    """Asserts that a finished run has the losses and the adapter of the undisturbed one, to the bit."""
    assert equal_so_far(setting, output_dir) == STEPS
    assert_same_adapter(setting.reference, output_dir)


def wait_for_step(run: Run, step: int) -> None:
    """Until the line of a step is there."""
    run.wait_for(rf"'step': '{step}/{STEPS}'")
