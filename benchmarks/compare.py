"""Runs the short form of every benchmark and lists the ratios that moved from the committed ones: `make bench`.

    python -m benchmarks.compare [--only layer optimizer ...] [--tolerance 0.1]

Benchmarks are those with committed ratios, `benchmarks/results/NAME.csv` of `benchmarks/bench_NAME.py` in the form that
`harness.py` writes; those measured on a GPU are left out. Ratios carry over between machines far better than times, but
not to 10 %: on other hardware than the committed results' (which is then said) expect some to have moved.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from .harness import RESULTS, ROOT, TIMES, Row, case_of, read_rows

GPU = ("gpu",)


def moved(committed: list[Row], fresh: list[Row], tolerance: float) -> tuple[list[str], int]:
    """A line for every ratio that differs by more than `tolerance`, and the number of ratios that were compared."""
    before = {(case_of(row), row["contender"]): float(row["ratio"]) for row in committed}
    lines, compared = [], 0
    for row in fresh:
        case = case_of(row)
        old, new = before.get((case, row["contender"])), float(row["ratio"])
        if old is None or row["contender"] == row["peer"]:
            continue
        compared += 1
        if abs(new / old - 1) > tolerance:
            where = " ".join(f"{name}={value}" for name, value in case)
            pair = f"{row['contender']} / {row['peer']}"
            lines.append(f"{where}: {pair} was {old:.3f}, is {new:.3f} ({new / old - 1:+.0%})")
    return lines, compared


def has_ratios(path: Path) -> bool:
    """Whether a file of results is one that `harness.Results` wrote, on a CPU."""
    rows = read_rows(path)
    return path.stem not in GPU and bool(rows) and set(TIMES) <= rows[0].keys()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of benchmarks")
    parser.add_argument("--tolerance", type=float, default=0.1)
    args = parser.parse_args()
    names = args.only or [path.stem for path in sorted(RESULTS.glob("*.csv")) if has_ratios(path)]
    failed = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "fresh.csv"
            command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--short", "--output", str(output)]
            if subprocess.run(command, cwd=ROOT.parent).returncode:
                failed.append(name)  # the others' figures are worth having all the same
                continue
            fresh = read_rows(output)
        committed = read_rows(RESULTS / f"{name}.csv")
        lines, compared = moved(committed, fresh, args.tolerance)
        for there in {row["hardware"] for row in committed} - {row["hardware"] for row in fresh}:
            print(f"\n{name}: committed results are from other hardware: {there}")
        print(f"\n{name}: {len(lines)} of {compared} ratios moved by more than {args.tolerance:.0%}")
        print("\n".join(lines))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
