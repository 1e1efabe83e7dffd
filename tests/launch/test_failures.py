"""One training run that is stopped in every way there is, restarted each time, and ends as if nothing had happened.

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
from tests.soak import Soak, differences
from tests.support.failures import (
    BATCH,
    FAULTY,
    STEPS,
    TRAIN,
    ForkedRun,
    Run,
    Setting,
    check_end,
    deepspeed_command,
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


def signalled(victim: Callable[[Run], int], number: int = signal.SIGTERM) -> Callable[[Run, int], float]:
    def act(run: Run, step: int) -> float:
        # A stopped rank saves nothing more: the step before has to be saved, which its number on the bar does not say.
        wait_for_step(run, step if number == signal.SIGSTOP else step - 1)
        os.kill(victim(run), number)
        return time.monotonic()

    return act


def helper_of(run: Run) -> int:
    """deepspeed.launcher.launch, which starts the ranks and watches over them."""
    return int(run.parent(run.rank(0)))


@dataclass
class Failure:
    """One way to stop a run.

    Args:
        name: for the table.
        fault: FAULT of tests/support/faulty_train.py, without the step; None: launch/train.py as it is.
        saves: whether the step in which it stops is saved.
        says: rank -> what it must have said.
        at: the step; None: three or four after the last checkpoint.
        more: arguments.
        by_command: started by the command `deepspeed`, whose part in the end is tested too.
    """

    name: str
    fault: str | None
    act: Callable[[Run, int], float]
    says: dict[str, str]
    saves: bool = False
    ends_well: bool | None = False  # None: the launcher ends with an error though its ranks do not
    at: int | None = None
    more: tuple[str, ...] = ()
    by_command: bool = False

    def start(self, setting: Setting, output_dir: Path, step: int) -> Run:
        arguments = [*setting.arguments, *BATCH, *self.more, "--output_dir", str(output_dir)]
        script = TRAIN if self.fault is None else FAULTY
        environment = {} if self.fault is None else {"FAULT": f"{self.fault}:{step}"}
        log = output_dir.with_name(f"{self.name.replace(' ', '-')}.log")
        if self.by_command:
            return Run(deepspeed_command(arguments, script=script), log, environment)
        return ForkedRun(arguments, log, environment, script=script)


LOST = r"rank {} \(\S+, pid \d+\) was lost: its connection closed\."
FAILURES = [
    Failure("rank 1 killed in forward", "forward:1", by_itself, {"0": LOST.format(1)}),
    Failure("rank 0 killed in the optimizer's all-reduce", "all-reduce:0", by_itself, {"1": LOST.format(0)}),
    Failure(
        "rank 1 stopped",
        None,
        signalled(lambda run: run.rank(1), signal.SIGSTOP),
        {"0": r"rank 1 \(\S+, pid \d+\) has given no sign of life for \d+ s: .*; it had completed .*step \d+"},
        more=("--ddp_timeout", "40"),
    ),
    Failure("rank 0 killed before the manifest", "manifest:0", by_itself, {"1": LOST.format(0)}),
    Failure(
        "rank 1 raises",
        "raise:1",
        by_itself,
        {
            "0": r"rank 1 \(\S+, pid \d+\) failed: RuntimeError: made up by a test",
            "1": "RuntimeError: made up by a test",
        },
    ),
    Failure(
        "rank 1's loss is NaN",
        "nan:1",
        by_itself,
        dict.fromkeys("01", r"not finite for 3 steps in a row.*rank 1 since step \d+.*checkpoint-\d+ is from before"),
    ),
    Failure("SIGTERM to rank 1", None, signalled(lambda run: run.rank(1)), {}, saves=True, ends_well=True),
    Failure(  # it signals the data loaders' workers, too
        "SIGTERM to DeepSpeed's launcher",
        None,
        signalled(helper_of),
        {},
        saves=True,
        ends_well=None,
        more=("--dataloader_num_workers", "1"),
        by_command=True,
    ),
    # The next attempt finds the last step done already, and must not do another.
    Failure("rank 1 killed before the final adapter is saved", "end:1", by_itself, {"0": LOST.format(1)}, at=STEPS),
]


def check_end_of_attempt(failure: Failure, run: Run, code: int) -> str:
    """Asserts the exit code and the messages; returns one of them, for the table."""
    assert (code == 0) == bool(failure.ends_well), f"{failure.name}: code {code}\n{run.output[-4000:]}"
    said = errors_in(run.output)
    for rank, pattern in failure.says.items():
        assert re.search(pattern, said.get(rank, "")), f"{failure.name}: {said}\n{run.output[-6000:]}"
    if failure.saves:
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
        saving = failure.fault == "manifest:0"  # only a step that is saved will do
        step = failure.at or reached + (4 if saving else 3)
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


@pytest.mark.parametrize(("ranks", "batch"), [(1, "4"), (4, "1")])
def test_going_on_with_another_number_of_ranks(setting: Setting, tmp_path: Path, ranks: int, batch: str) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(setting.reference / "checkpoint-16", output_dir / "checkpoint-16")
    arguments = [*setting.arguments, "--per_device_train_batch_size", batch, "--output_dir", str(output_dir)]
    run = ForkedRun(arguments, tmp_path / "run.log", ranks=ranks)
    assert run.finish() == 0, run.output[-4000:]
    assert f"topology.world_size 2 -> {ranks}" in run.output
    # fp32 sums in another order, over eight steps of AdamW.
    assert losses_of(output_dir / f"checkpoint-{STEPS}") == pytest.approx(setting.losses(), rel=1e-4)


def test_soak(setting: Setting, tmp_path: Path) -> None:
    """The short form of `make soak`: launch/supervise.sh restarts what is killed at random."""
    soak = Soak([*setting.arguments, *BATCH], tmp_path / "soaked", STEPS, seed=1)
    try:
        kills = soak.kill(1, while_starting=0.0)
        assert soak.run.finish() == 0, soak.run.output[-4000:]
    finally:
        soak.run.end()
    assert max(kill.seconds for kill in kills) < LIMIT
    assert differences(setting.reference, tmp_path / "soaked", STEPS) == []
