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


NAMES = st.sampled_from(
    ["worker-0", "worker-1", "10.0.0.2", "a.b", "-oProxyCommand=x", "a b", "$(true)", "é", "a;b", "", "x" * 300]
)
SLOTS = st.sampled_from(
    ["slots=1", "slots=8", "slots=0", "slots=-1", "slots=8x", "slots", "8", "slots=1 slots=2", "", "slots= 2"]
)
COMMENTS = st.sampled_from(["", "  # comment", "\t", "\r", "\x00", "\x0b"])


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(lines=st.lists(st.tuples(NAMES, SLOTS, COMMENTS), max_size=4))
def test_host_files(lines: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file is read as it says, or refused by name; what could reach a shell never is a host's name."""
    path = tmp_path_factory.getbasetemp() / "hosts"
    path.write_bytes("\n".join(f"{name} {slots}{comment}" for name, slots, comment in lines).encode())
    good = {"worker-0", "worker-1", "10.0.0.2", "a.b"}
    names = [name for name, _, _ in lines]
    valid = (
        bool(lines)
        and set(names) <= good
        and len(set(names)) == len(names)
        and all(slots in ("slots=1", "slots=8") and comment not in ("\x00", "\x0b") for _, slots, comment in lines)
    )
    blank = [line for line in lines if not "".join(line[:2]).strip() and line[2] in ("", "  # comment", "\t", "\r")]
    if blank:
        return  # neither a host nor a mistake
    if valid:
        assert read_hostfile(path) == {name: int(slots.removeprefix("slots=")) for name, slots, _ in lines}
    else:
        with pytest.raises(UserError, match="--hostfile"):
            read_hostfile(path)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
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
