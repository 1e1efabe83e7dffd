"""Drawn launch configurations: `python -m tests.fuzz_launch` has longer forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest

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
