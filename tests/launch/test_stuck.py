"""A rank is stuck but lives: all end within the collectives' time limit and 30 s, and name it and where it stood."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.support import stuck_rank
from tests.support.failures import errors_in
from tests.support.forks import run_script, start_forked
from tests.support.launch_support import find_free_port, launch_environment

pytestmark = pytest.mark.dist

PATIENCE = 300.0  # for processes to start on a busy machine


@pytest.mark.parametrize(("kind", "rank"), [("stopped", 1), ("stopped", 0), ("lock", 1)])
def test_a_stuck_rank_is_named(kind: str, rank: int, tmp_path: Path) -> None:
    """Started by hand: no launcher ends what is left."""
    common = {**launch_environment(), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "STUCK": f"{kind}:{rank}"}
    common["MASTER_PORT"] = str(find_free_port())
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    processes = []
    for number, log in enumerate(logs):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(start_forked(run_script, stuck_rank.__file__, [], common | own, str(log)))
    deadline = time.monotonic() + PATIENCE
    while not logs[rank].exists() or "stuck" not in logs[rank].read_text():
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    since = time.monotonic()
    for process in processes:
        process.join(timeout=max(since + stuck_rank.SECONDS + 30 - time.monotonic(), 0.1))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert all(codes), codes  # neither 0 nor None
    where = "no sign of life" if kind == "stopped" else r"stands in stuck_rank.py:\d+ get_stuck"
    for number, log in enumerate(logs):
        if kind == "lock" or number != rank:
            said = errors_in(log.read_text()).get(str(number), "")
            named = rf"rank {rank} \(\S+, pid {processes[rank].pid}\).*{where}.*step 3"
            assert re.search(named, said), log.read_text()[-3000:]
