"""One training run that is stopped in many ways, restarted each time, and ends as if nothing had happened.

Each attempt is the launcher with two ranks, goes on from the newest complete checkpoint of the one before
(`--resume_from_checkpoint auto`), and meets another fault. `pytest tests/launch/test_failures.py -s` prints the table
of docs/failures.md.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.checkpoint.resume import checkpoints, fault
from tests.soak import Soak
from tests.support.failures import (
    BATCH,
    FAULTY,
    STEPS,
    TRAIN,
    ForkedRun,
    Run,
    Setting,
    check_end,
    equal_so_far,
    errors_in,
    losses_of,
    undisturbed_run,
    wait_for_step,
)

pytestmark = pytest.mark.dist

LIMIT = 300.0  # seconds from a fault until every process is gone: a hang, whatever the machine


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return undisturbed_run(tmp_path_factory.getbasetemp())


# -- the faults: each does something to an attempt that runs, and knows what has to be said ---------------------------


def by_itself(run: Run, step: int) -> float:
    """The fault is in the process; the time counts from the last step before it."""
    wait_for_step(run, step - 1)
    return time.monotonic()


def sigterm_to_rank_1(run: Run, step: int) -> float:
    wait_for_step(run, step - 1)
    os.kill(run.rank(1), signal.SIGTERM)
    return time.monotonic()


def helper_of(run: Run) -> int:
    """deepspeed.launcher.launch, which starts the ranks and watches over them."""
    return int(run.parent(run.rank(0)))


@dataclass
class Failure:
    """One way to stop a run.

    Args:
        name: for the table.
        fault: FAULT of tests/support/faulty_train.py, without the step; None: launch/train.py as it is.
        says: rank -> what it must have said.
        is_signal: the ranks save the step, and end well.
        after: steps behind the last checkpoint; None: the last step of all.
    """

    name: str
    fault: str | None
    act: Callable[[Run, int], float]
    says: dict[str, str]
    is_signal: bool = False
    after: int | None = 3

    def start(self, setting: Setting, output_dir: Path, step: int) -> Run:
        arguments = [*setting.arguments, *BATCH, "--output_dir", str(output_dir)]
        script = TRAIN if self.fault is None else FAULTY
        environment = {} if self.fault is None else {"FAULT": f"{self.fault}:{step}"}
        log = output_dir.with_name(f"{self.name.replace(' ', '-')}.log")
        return ForkedRun(arguments, log, environment, script=script)


LOST = r"rank {} \(\S+, pid \d+\) was lost: its connection closed\."
FAILURES = [
    Failure("rank 0 killed in the optimizer's all-reduce", "all-reduce:0", by_itself, {"1": LOST.format(0)}),
    Failure("rank 0 killed before the manifest", "manifest:0", by_itself, {"1": LOST.format(0)}, after=4),
    Failure(
        "rank 1 raises while it saves",
        "saving:1",
        by_itself,
        {
            "0": r"rank 1 \(\S+, pid \d+\) failed: RuntimeError: made up by a test",
            "1": "RuntimeError: made up by a test",
        },
        after=4,
    ),
    Failure(
        "rank 1's loss is NaN",
        "nan:1",
        by_itself,
        dict.fromkeys("01", r"not finite for 3 steps in a row.*rank 1 since step \d+.*checkpoint-\d+ is from before"),
    ),
    Failure("SIGTERM to rank 1", None, sigterm_to_rank_1, {}, is_signal=True),
    # The next attempt finds the last step done already, and must not do another.
    Failure("rank 1 killed before the final adapter is saved", "end:1", by_itself, {"0": LOST.format(1)}, after=None),
]


def check_end_of_attempt(failure: Failure, run: Run, code: int) -> str:
    """Asserts the exit code and the messages; returns one of them, for the table."""
    assert (code == 0) == failure.is_signal, f"{failure.name}: code {code}\n{run.output[-4000:]}"
    said = errors_in(run.output)
    for rank, pattern in failure.says.items():
        assert re.search(pattern, said.get(rank, "")), f"{failure.name}: {said}\n{run.output[-6000:]}"
    if failure.is_signal:
        match = re.search(r"Stopped by a signal after step \d+.*", run.output)
        assert match, run.output[-4000:]
        return match.group()
    rank, pattern = next(iter(failure.says.items()))
    return f"[rank {rank}] error: {said[rank]}"


def test_every_failure_and_the_run_goes_on(
    setting: Setting, tmp_path: Path, report: Callable[[str, str], None]
) -> None:
    output_dir = tmp_path / "run"
    reached = 0
    for failure in FAILURES:
        step = STEPS if failure.after is None else reached + failure.after
        run = failure.start(setting, output_dir, step)
        since = failure.act(run, step)
        code = run.finish(timeout=LIMIT)
        seconds = time.monotonic() - since
        message = check_end_of_attempt(failure, run, code)
        assert seconds < LIMIT, f"{failure.name}: {seconds:.0f} s"
        before, reached = reached, equal_so_far(setting, output_dir)
        assert reached > before, failure.name
        report("failures", f"| {failure.name} | {seconds:.1f} s | {code} | {message} | {before} -> {reached}: equal |")
    arguments = [*setting.arguments, *BATCH, "--output_dir", str(output_dir)]
    run = ForkedRun(arguments, tmp_path / "last.log")
    assert run.finish() == 0, run.output[-4000:]
    check_end(setting, output_dir)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs (root): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(setting: Setting, small_disk: Path, tmp_path: Path, report: Callable[[str, str], None]) -> None:
    """Every rank says which path could not be saved; after room is made the run goes on from the last complete one."""
    output_dir = small_disk / "run"
    shutil.copytree(setting.reference / "checkpoint-2", output_dir / "checkpoint-2")
    filler = small_disk / "filler"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    filler.write_bytes(b"\0" * (free - (100 << 10)))  # a checkpoint has some 300 kB
    arguments = [*setting.arguments, *BATCH, "--output_dir", str(output_dir), "--save_total_limit", "1"]
    run = ForkedRun(arguments, tmp_path / "full.log")
    since = by_itself(run, 4)
    assert run.finish() != 0
    seconds = time.monotonic() - since
    assert seconds < LIMIT
    said = errors_in(run.output)
    for rank in "01":
        assert re.search(rf"{output_dir}/\.partial/checkpoint-4 could not be saved", said.get(rank, "")), run.output[
            -5000:
        ]
    assert [path.name for path in checkpoints(output_dir)] == ["checkpoint-2"]
    assert fault(output_dir / "checkpoint-2") is None
    filler.unlink()
    run = ForkedRun(arguments, tmp_path / "again.log")
    assert run.finish() == 0, run.output[-4000:]
    check_end(setting, output_dir)
    assert [path.name for path in checkpoints(output_dir)] == [f"checkpoint-{STEPS}"]
    report(
        "failures",
        f"| full disk while saving | {seconds:.1f} s | 1 | [rank 0] error: {said['0']} | 2 -> {STEPS}: equal |",
    )


def test_going_on_with_another_number_of_ranks(setting: Setting, tmp_path: Path) -> None:
    """On four; `test_launch_runs.py` goes on with one."""
    output_dir, begun = tmp_path / "run", f"checkpoint-{STEPS - 6}"
    shutil.copytree(setting.reference / begun, output_dir / begun)
    arguments = [*setting.arguments, "--per_device_train_batch_size", "1", "--output_dir", str(output_dir)]
    run = ForkedRun(arguments, tmp_path / "run.log", ranks=4)
    assert run.finish() == 0, run.output[-4000:]
    assert "topology.world_size 2 -> 4" in run.output
    # fp32 sums in another order, over six steps of AdamW.
    assert losses_of(output_dir / f"checkpoint-{STEPS}") == pytest.approx(setting.losses(), rel=1e-4)


def test_supervised(setting: Setting, tmp_path: Path, report: Callable[[str, str], None]) -> None:
    """The command `deepspeed` under launch/supervise.sh: restarted after a kill, saved after SIGTERM to its launcher.

    DeepSpeed's launcher signals the data loaders' workers, too: here those of an epoch that began after the resume,
    whose loader is another one than that of the resumed epoch. `make soak` kills more often.
    """
    output_dir = tmp_path / "run"
    soak = Soak([*setting.arguments, *BATCH, "--dataloader_num_workers", "1"], output_dir, STEPS, seed=1)
    try:
        assert soak.kill_at(2).seconds < LIMIT
        soak.wait_for_step(10)
        os.kill(helper_of(soak.run), signal.SIGTERM)
        since = time.monotonic()
        assert soak.run.finish(timeout=LIMIT) == 0, soak.run.output[-4000:]
        seconds = time.monotonic() - since
    finally:
        soak.run.end()
    stopped = re.search(r"Stopped by a signal after step \d+.*", soak.run.output)
    assert stopped, soak.run.output[-4000:]
    reached = equal_so_far(setting, output_dir)
    assert reached >= 10
    report(
        "failures", f"| SIGTERM to DeepSpeed's launcher | {seconds:.1f} s | 1 | {stopped.group()} | {reached}: equal |"
    )
    run = ForkedRun([*setting.arguments, *BATCH, "--output_dir", str(output_dir)], tmp_path / "last.log")
    assert run.finish() == 0, run.output[-4000:]
    check_end(setting, output_dir)
