"""Drawn launch configurations: `python -m tests.fuzz_launch` has longer forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fuzz_launch import LIMIT_SECONDS, fuzz, fuzz_processes

TABLE = "Fuzz of the launch configuration"


def test_every_draw_gets_its_answer(report: Callable[[str, str], None]) -> None:
    """An invalid one a single message, the same on every rank; a valid one none."""
    figures = fuzz(200)
    report(TABLE, f"in process: {figures.line()}")
    assert figures.invalid > 100
    assert figures.draws - figures.invalid > 20
    assert max(figures.seconds) < LIMIT_SECONDS


@pytest.mark.dist
def test_on_real_ranks(report: Callable[[str, str], None]) -> None:
    figures = fuzz_processes(3)
    report(TABLE, f"deepspeed --num_gpus 2: {figures.line()}")
    assert figures.draws == 3
    assert max(figures.seconds) < LIMIT_SECONDS
