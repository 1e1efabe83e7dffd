"""Writes the tables between the markers of docs/convergence.md, and its plots, from benchmarks/results/convergence.csv.

    python -m benchmarks.convergence.report
    python -m benchmarks.convergence.report --results FILE --document outputs/convergence/report.md

A document that does not exist is made: the tables alone, with the plots beside it.
"""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

from ..harness import RESULTS, ROOT, Row, read_rows
from .results import Cells
from .studies import SIZES
from .tables import sections

DOCUMENT = ROOT.parent / "docs" / "convergence.md"


def origin(rows: list[Row], clock: str = "CPU time") -> str:
    """Where the rows come from; `clock`: of their seconds."""
    values = {name: sorted({row[name] for row in rows}) for name in ("date", "hardware", "versions", "commit")}
    seconds = sum(float(row["seconds"]) for row in rows)
    return (
        f"{len(rows)} runs, {seconds / 60:.0f} minutes of {clock} for their steps; {', '.join(values['date'])}; "
        f"{' / '.join(values['hardware'])}; {' / '.join(values['versions'])}; commit {', '.join(values['commit'])}."
    )


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with every table between its markers.

    Raises:
        ValueError: a table has no markers, or a marker no table.
    """
    found = set(re.findall(r"<!-- table: (.*?) -->", text))
    if found != set(tables):
        raise ValueError(f"markers without table, or tables without marker: {', '.join(sorted(found ^ set(tables)))}.")
    for name, table in tables.items():
        pattern = rf"(<!-- table: {re.escape(name)} -->).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, table=table: f"{m[1]}\n\n{table}\n\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def bare(tables: dict[str, str], images: list[str]) -> str:
    """A document of nothing but tables and plots."""
    parts = [f"## {name}\n\n<!-- table: {name} -->\n<!-- end -->\n" for name in tables]
    return "\n".join(["# Convergence\n", *(f"![{name}]({name})\n" for name in images), *parts])


def draw(cells: Cells, size: str, folder: Path) -> list[str]:
    """The plots, and their names; without matplotlib it says so and draws nothing."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so nothing was drawn: pip install -e .[bench]")
        return []
    from .plots import FIGURES

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        figure(cells, size, folder / name)
    return list(FIGURES)


def write(rows: list[Row], size: str, document: Path, images: Path) -> None:
    """Tables and plots of the runs of one size."""
    cells = Cells(rows)
    tables = {"origin": origin(rows), **sections(cells, size)}
    drawn = draw(cells, size, images)
    text = document.read_text() if document.exists() else bare(tables, drawn)
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(fill(text, tables))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "convergence.csv", help="%(default)s")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="%(default)s")
    parser.add_argument("--size", choices=list(SIZES), default="medium", help="of the runs (%(default)s)")
    args = parser.parse_args(argv)
    rows = read_rows(args.results)
    if not rows:
        parser.error(f"--results {args.results}: no rows; run python -m benchmarks.bench_convergence first.")
    images = DOCUMENT.parent / "images" if args.document == DOCUMENT else args.document.parent
    write(rows, args.size, args.document, images)


if __name__ == "__main__":
    main()
