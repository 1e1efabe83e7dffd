"""Drawn launch configurations: `python -m tests.fuzz_launch` has longer forms."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.checks.errors import UserError
from launch.cluster.hosts import read_hostfile
from tests.fuzz_launch import LIMIT_SECONDS, fuzz, fuzz_processes

TABLE = "Fuzz of the launch configuration"


def test_every_draw_gets_its_answer(report: Callable[[str, str], None]) -> None:
    """An invalid one a single message, the same on every rank; a valid one none."""
    figures = fuzz(100)
    report(TABLE, f"in process: {figures.line()}")
    assert figures.invalid > 50
    assert figures.draws - figures.invalid > 10
    assert max(figures.seconds) < LIMIT_SECONDS


@pytest.mark.dist
def test_on_real_ranks(report: Callable[[str, str], None]) -> None:
    figures = fuzz_processes(2)
    report(TABLE, f"deepspeed --num_gpus 2: {figures.line()}")
    assert figures.draws == 2
    assert max(figures.seconds) < LIMIT_SECONDS


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_a_host_file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "hosts"
    path.write_bytes(content)
    try:
        hosts = read_hostfile(path)
    except UserError:
        return
    assert hosts
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and slots > 0 for name, slots in hosts.items())
