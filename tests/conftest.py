"""Tables that tests print at the end of the run, and the environment that multi-process tests need."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_tables: dict[str, list[str]] = defaultdict(list)


@pytest.fixture
def report() -> Callable[[str, str], None]:
    """`report(table, line)`: the line is printed under the table's title after the tests."""
    return lambda table, line: _tables[table].append(line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in _tables.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


def pytest_sessionfinish() -> None:
    from tests.support.ranks import close_pools

    close_pools()
