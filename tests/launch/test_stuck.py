"""A rank is stuck but lives: all end within the collectives' time limit and 30 s, and name it and where it stood."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tests.support import stuck_rank
from tests.support.failures import Run, errors_in
from tests.support.launch_support import find_free_port

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(("kind", "rank"), [("stopped", 1), ("stopped", 0), ("lock", 1)])
def test_a_stuck_rank_is_named(kind: str, rank: int, tmp_path: Path) -> None:
    """Started by hand: no launcher ends what is left."""
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    runs = []
    for number in map(str, range(3)):
        variables = {**common, "RANK": number, "LOCAL_RANK": number, "STUCK": f"{kind}:{rank}"}
        runs.append(Run([sys.executable, stuck_rank.__file__], tmp_path / f"{number}.log", variables))
    try:
        runs[rank].wait_for("stuck", timeout=300)
        since = time.monotonic()
        codes = [run.finish(timeout=stuck_rank.SECONDS + 30 + 60) for run in runs]
        seconds = time.monotonic() - since
    finally:
        for run in runs:
            run.end()
    assert all(codes), codes
    assert seconds < stuck_rank.SECONDS + 30
    where = "no sign of life" if kind == "stopped" else r"stands in stuck_rank.py:\d+ get_stuck"
    for number, run in enumerate(runs):
        if kind == "lock" or number != rank:
            said = errors_in(run.output).get(str(number), "")
            assert re.search(rf"rank {rank} \(\S+, pid {runs[rank].process.pid}\).*{where}.*step 3", said), run.output[
                -3000:
            ]
