"""Tables that tests print at the end of the run, their order, and the environment that multi-process tests need."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files that take longest, longest first: no process is left alone with one of them at the end. Seconds of a core.
LONGEST = {
    "launch/test_failures.py": 150,
    "conformance/test_settings.py": 90,
    "launch/test_launch_runs.py": 80,
    "integrations/test_front_ends.py": 40,
    "project/test_autoload.py": 40,
    "optimizer/test_zero_exactness.py": 30,
    "launch/test_base_experts.py": 30,
    "launch/test_launch_fuzz.py": 30,
    "launch/test_recipes.py": 30,
    "launch/test_failures_network.py": 20,
}

_tables: dict[str, list[str]] = defaultdict(list)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first."""
    tests = Path(__file__).parent
    items.sort(key=lambda item: -LONGEST.get(item.path.relative_to(tests).as_posix(), 0))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`report(table, line)`: the line is printed under the table's title after the tests."""
    return lambda table, line: request.node.user_properties.append(("table", (table, line)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for name, value in report.user_properties:
            if name == "table":
                _tables[value[0]].append(value[1])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in _tables.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


def pytest_sessionfinish() -> None:
    from tests.support.ranks import close_pools

    close_pools()
