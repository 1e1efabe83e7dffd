"""The planner's step times beside those that bench_expert_parallel.py measured, machine and run being the same.

    python benchmarks/check_plan.py [--calibration FILE] [--results FILE]

Both files come from one run of that benchmark: collectives and FLOP/s (all that the planner knows of the machine), and
forward and backward times of one adapted layer, by dispatch and compute. Rows with as many ranks as the calibration had
are compared. What matters for choosing is regret: how much slower than the fastest the way is that the planner takes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path

from ds_moelora.planner.hardware import Hardware, hardware, load_calibration
from ds_moelora.planner.timing import layer_time
from ds_moelora.planner.workload import Choice, Workload

RESULTS = Path(__file__).parent / "results"
WAYS = {f"{d}, {c}": (d, c) for d, c in itertools.product(("weights", "tokens"), ("dense", "grouped"))}
POINT = ("E", "k", "r", "tokens_per_rank", "features")


def planned_ms(row: Mapping[str, str], machine: Hardware) -> float:
    """The planner's time of the layer that a row of the results measured."""
    dispatch, compute = WAYS[row["case"]]
    work = Workload(
        num_experts=int(row["E"]),
        top_k=int(row["k"]),
        rank=int(row["r"]),
        gpus=int(row["ranks"]),
        sequence_length=int(row["tokens_per_rank"]),
        dtype="fp32",
        checkpointing=False,
        expert_compute=compute,
    )
    way, features = Choice(stage=0, ep_size=work.gpus, dispatch=dispatch), int(row["features"])
    return 1e3 * layer_time(features, features, work, way, machine).total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default=RESULTS / "expert_parallel_calibration.json", metavar="FILE")
    parser.add_argument("--results", default=RESULTS / "expert_parallel.csv", metavar="FILE")
    parser.add_argument("--ranks", default="2", help="of the rows to compare: as many as the calibration had")
    args = parser.parse_args(argv)
    machine = load_calibration(args.calibration, hardware())
    wanted = (args.ranks, "1")
    with open(args.results, newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["ranks"], r["layers"]) == wanted and r["case"] in WAYS]
    print(f"{machine.name}; {args.ranks} ranks; planned / measured milliseconds of forward and backward\n")
    print("| E, k, r, tokens, features | " + " | ".join(WAYS) + " | the planner takes | regret |")
    print("|---|" + "---:|" * len(WAYS) + "---|---:|")
    ratios: dict[int, list[float]] = {}
    regrets = []
    for point, group in itertools.groupby(rows, key=lambda row: tuple(row[name] for name in POINT)):
        measured = {row["case"]: float(row["ms_median"]) for row in group}
        sizes = {**dict(zip(POINT, point, strict=True)), "ranks": args.ranks}
        planned = {case: planned_ms({**sizes, "case": case}, machine) for case in measured}
        taken = min(planned, key=lambda case: planned[case])
        tokens = int(sizes["tokens_per_rank"])
        ratios.setdefault(tokens, []).extend(planned[case] / measured[case] for case in measured)
        regrets.append(measured[taken] / min(measured.values()) - 1)
        cells = [f"{planned[case]:.1f} / {measured[case]:.1f}" for case in WAYS]
        print(f"| {', '.join(point)} | " + " | ".join(cells) + f" | {taken} | {regrets[-1]:.0%} |")
    print()
    for tokens, found in sorted(ratios.items()):
        middle = statistics.median(found)
        print(f"planned / measured, {tokens} tokens: {middle:.2f} ({min(found):.2f} to {max(found):.2f})")
    near = sum(regret <= 0.1 for regret in regrets)
    worst = f"median {statistics.median(regrets):.0%}, at most {max(regrets):.0%}"
    print(f"regret: {worst}, up to 10% at {near} of {len(regrets)} points")


if __name__ == "__main__":
    main()
