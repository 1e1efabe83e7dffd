"""A fuzz of the launch configuration: every invalid draw ends in one clear error, and no valid one is refused.

The draws are the same every time; `DRAWS=2000 pytest tests/launch/test_launch_fuzz.py` makes more of them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import huggingface_hub
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from launch import train
from launch.checks.errors import UserError
from launch.training import modeling
from tests.support.launch_draws import RANKS, Draw, draws
from tests.support.launch_support import launch, tiny_model

LIMIT_SECONDS = 300
DRAWS = int(os.environ.get("DRAWS", "100"))
TABLE = "Fuzz of the launch configuration"


class Started(Exception):  # noqa: N818
    """The checks found nothing: from here on ranks wait for each other."""


@dataclass
class Figures:
    """What the draws came to."""

    draws: int = 0
    invalid: int = 0
    seconds: list[float] = field(default_factory=list)
    slowest: str = ""

    def line(self) -> str:
        return (
            f"{self.draws} draws, {self.invalid} invalid; seconds to the error: median "
            f"{statistics.median(self.seconds):.2f}, maximum {max(self.seconds):.2f} {self.slowest}"
        )


@contextmanager
def stopped_before_training() -> Iterator[None]:
    """Inside, the launcher's `main` raises `Started` where torch.distributed would open."""

    def stop(*args: Any) -> None:
        raise Started

    with ExitStack() as patches:
        for owner, name in ((train, "start"), (modeling, "load_model")):
            patches.enter_context(mock.patch.object(owner, name, stop))
        for values in (huggingface_hub.constants, datasets.config):  # without a network they try for a minute
            patches.enter_context(mock.patch.object(values, "HF_HUB_OFFLINE", True))
        yield


def verdicts(argv: list[str]) -> list[str | None]:
    """What each rank says, one after the other; None: it would start training.

    Raises:
        whatever is no `UserError`.
    """
    said: list[str | None] = []
    for rank in range(RANKS):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
        with mock.patch.dict(os.environ, environment), stopped_before_training():
            try:
                train.main(argv)
            except Started:
                said.append(None)
            except UserError as error:
                said.append(str(error))
    return said


def fault(draw: Draw, folder: Path, figures: Figures) -> str | None:
    """What is wrong with the launcher's answer to a draw; None: nothing."""
    figures.draws += 1
    figures.invalid += bool(draw.wrong)
    argv = draw.write(folder)
    started = time.monotonic()
    try:
        said = verdicts(argv)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = [f for f in last if "/launch/" in f.filename or "/ds_moelora/" in f.filename][-1]
        return f"{type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}: {error}"
    if draw.wrong:
        figures.seconds.append((time.monotonic() - started) / RANKS)
        if figures.seconds[-1] == max(figures.seconds):
            figures.slowest = str(draw.wrong)
    if len(set(said)) > 1:
        return f"the ranks disagree: {said}"
    if draw.wrong and said[0] is None:
        return "would start training"
    if not draw.wrong and said[0] is not None:
        return f"refused: {said[0]}"
    if said[0] is not None and not said[0].strip():
        return "an empty message"
    return None


def fuzz(count: int) -> Figures:
    """`count` draws, the same ones every time."""
    figures = Figures()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model")

        @settings(
            max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(draws(model, folder / "out"))
        def every_draw(draw: Draw) -> None:
            found = fault(draw, folder, figures)
            assert found is None, f"{found}\n{draw}"

        every_draw()
    return figures


def fuzz_processes(count: int) -> Figures:
    """The first `count` invalid draws that differ in what is wrong with them, each on real ranks.

    Raises:
        AssertionError: a rank without its one line, a traceback, exit code 0, more than `LIMIT_SECONDS`, or a process
            that is left.
    """
    figures, chosen = Figures(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model")

        @settings(max_examples=40 * count, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
        @given(draws(model, folder / "out"))
        def collect(draw: Draw) -> None:
            if draw.wrong:
                chosen.setdefault(next(iter(draw.wrong)).split()[0], draw)

        collect()
        for draw in list(chosen.values())[:count]:
            finished = launch(draw.write(folder), ranks=RANKS, timeout=LIMIT_SECONDS)
            figures.draws += 1
            figures.invalid += 1
            figures.seconds.append(finished.seconds)
            lines = [line for line in finished.output.splitlines() if "] error: " in line]
            assert finished.code != 0, f"{draw.wrong}: exit code 0"
            assert sorted(line[: len("[rank 0]")] for line in lines) == [f"[rank {rank}]" for rank in range(RANKS)], (
                f"{draw.wrong}:\n{finished.output[-3000:]}"
            )
            assert "Traceback" not in finished.output, f"{draw.wrong}:\n{finished.output[-3000:]}"
            assert not running_with(str(folder)), f"{draw.wrong}: left {running_with(str(folder))}"
    return figures


def running_with(text: str) -> list[str]:
    """Command lines of other processes on this machine that have `text` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        if text in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def test_every_draw_gets_its_answer(report: Callable[[str, str], None]) -> None:
    """An invalid one a single message, the same on every rank; a valid one none."""
    figures = fuzz(DRAWS)
    report(TABLE, f"in process: {figures.line()}")
    assert figures.invalid > DRAWS / 2
    assert figures.draws - figures.invalid > DRAWS / 10
    assert max(figures.seconds) < LIMIT_SECONDS


@pytest.mark.dist
def test_on_real_ranks(report: Callable[[str, str], None]) -> None:
    figures = fuzz_processes(2)
    report(TABLE, f"deepspeed --num_gpus 2: {figures.line()}")
    assert figures.draws == 2
    assert max(figures.seconds) < LIMIT_SECONDS
