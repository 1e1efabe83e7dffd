"""A rank is stuck but lives: all end within the collectives' time limit and 30 s, and name it and where it stood."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests.support import stuck_rank
from tests.support.failures import errors_in
from tests.support.forks import run_script, start_forked
from tests.support.launch_support import find_free_port, launch_environment

pytestmark = pytest.mark.dist

PATIENCE = 300.0  # for processes to start on a busy machine


@dataclass
class Stuck:
    """Three ranks, started by hand: no launcher ends what is left. One of them gets stuck."""

    kind: str
    rank: int
    processes: list[ForkServerProcess]
    logs: list[Path]

    def says_so(self) -> bool:
        return self.logs[self.rank].exists() and "stuck" in self.logs[self.rank].read_text()


def start(kind: str, rank: int, folder: Path) -> Stuck:
    common = {**launch_environment(), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "STUCK": f"{kind}:{rank}"}
    common["MASTER_PORT"] = str(find_free_port())
    logs = [folder / f"{kind}-{rank}-{number}.log" for number in range(3)]
    processes = []
    for number, log in enumerate(logs):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(start_forked(run_script, stuck_rank.__file__, [], common | own, str(log)))
    return Stuck(kind, rank, processes, logs)


def test_a_stuck_rank_is_named(tmp_path: Path) -> None:
    """Three runs side by side: each waits most of the time."""
    runs = [start(kind, rank, tmp_path) for kind, rank in (("stopped", 1), ("stopped", 0), ("lock", 1))]
    deadline = time.monotonic() + PATIENCE
    while not all(run.says_so() for run in runs):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    since = time.monotonic()
    for process in (process for run in runs for process in run.processes):
        process.join(timeout=max(since + stuck_rank.SECONDS + 30 - time.monotonic(), 0.1))
    codes = {f"{run.kind} {run.rank}": [process.exitcode for process in run.processes] for run in runs}
    for process in (process for run in runs for process in run.processes):
        process.kill()
    assert all(code for by_rank in codes.values() for code in by_rank), codes  # neither 0 nor None
    for run in runs:
        where = "no sign of life" if run.kind == "stopped" else r"stands in stuck_rank.py:\d+ get_stuck"
        for number, log in enumerate(run.logs):
            if run.kind == "lock" or number != run.rank:
                said = errors_in(log.read_text()).get(str(number), "")
                named = rf"rank {run.rank} \(\S+, pid {run.processes[run.rank].pid}\).*{where}.*step 3"
                assert re.search(named, said), log.read_text()[-3000:]
