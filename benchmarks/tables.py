"""Writes tables into benchmarks/README.md, between its markers, from benchmarks/results/{layer,optimizer}.csv.

python -m benchmarks.tables
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .harness import RESULTS, ROOT, Row, case_of, read_rows

PARTS = ("whole", "zero", "threads", "offload")  # of the optimizer's cases
WAYS = ("cpp", "eager", "loop", "flat")  # of the optimizer's step, beside torch's
NAMES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass
class Case:
    """All contenders of one case."""

    rows: dict[str, Row]

    def __getitem__(self, column: str) -> str:
        return self.rows["base"][column]

    @property
    def auto(self) -> str:
        """The compute that "auto" takes: "dense" or "grouped"."""
        return next(name for name in ("dense", "grouped") if self.rows[name]["auto"])

    def ratio(self, name: str, peer: str = "base") -> float:
        """Time of one contender by another's. To PEFT, and to the base: paired in each round; else of two medians."""
        column = {"base": "ratio", "peft": "over_peft"}.get(peer)
        if column is None:
            return float(self.rows[name]["ratio"]) / float(self.rows[peer]["ratio"])
        return float(self.rows[name][column])

    def over_peft(self, column: str) -> float:
        """What "auto" takes of something, by what PEFT takes."""
        return float(self.rows[self.auto][column]) / float(self.rows["peft"][column])

    @property
    def over_best(self) -> float:
        """Time of "auto" by that of the better compute."""
        return self.ratio(self.auto) / min(self.ratio("dense"), self.ratio("grouped"))

    @property
    def name(self) -> str:
        """For a table's first column."""
        size = f"{self['experts']}, {self['top_k']}, {self['rank']}; {self['in_features']} x {self['out_features']}"
        return f"{NAMES[self['dtype']]}; {size}" + ("" if self["mode"] == "decode" else f"; {self['tokens']}")


def cases(rows: list[Row]) -> list[Case]:
    """The rows of a file, case by case."""
    found: dict[object, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(case_of(row), {})[row["contender"]] = row
    return [Case(contenders) for contenders in found.values()]


def training_table(chosen: list[Case]) -> Iterator[str]:
    yield (
        "| dtype; E, k, r; in x out; tokens | bound | PEFT | dense | grouped | auto: which | / PEFT | / better one |"
        + (" loop / auto | saved / PEFT | peak / PEFT |")
    )
    yield "|---" * 11 + "|"
    for case in chosen:
        figures = [float(case["bound"]), case.ratio("peft"), case.ratio("dense"), case.ratio("grouped")]
        loop = f"{case.ratio('loop', case.auto):.1f}" if "loop" in case.rows else ""
        memory = [f"{case.over_peft('saved_mb'):.2f}", f"{case.over_peft('peak_mb'):.2f}"]
        auto = [case.auto, f"**{case.ratio(case.auto, 'peft'):.2f}**", f"{case.over_best:.2f}"]
        yield "| " + " | ".join([case.name, *(f"{f:.2f}" for f in figures), *auto, loop, *memory]) + " |"


def decoding_table(chosen: list[Case]) -> Iterator[str]:
    yield "| dtype; E, k, r; in x out | base, µs | PEFT | dense | grouped | auto: which | added / PEFT's |"
    yield "|---" * 7 + "|"
    for case in chosen:
        base, added = float(case["median_ms"]) * 1e3, float(case.rows[case.auto]["added"])
        ratios = " | ".join(f"{case.ratio(name):.2f}" for name in ("peft", "dense", "grouped"))
        yield f"| {case.name} | {base:.0f} | {ratios} | {case.auto} | **{added:.2f}** |"


def goal(title: str, bound: float, chosen: list[Case], figure: Callable[[Case], float], least: bool = False) -> str:
    """A row: in how many of the cases a figure keeps its bound, and the worst."""
    figures = {case.name: figure(case) for case in chosen}
    kept = sum(f >= bound if least else f <= bound for f in figures.values())
    worst = (min if least else max)(figures, key=lambda name: figures[name])
    sign = ">=" if least else "<="
    verdict = "met" if kept == len(figures) else f"met in {kept} of {len(figures)}"
    return f"| {title} | {sign} {bound:g} | {verdict} | {figures[worst]:.2f} ({worst}) |"


def goals(trained: list[Case], kept: list[Case], decoded: list[Case]) -> Iterator[str]:
    yield "| goal | bound | result | worst |"
    yield "|---|---|---|---|"
    dense = [case for case in trained if case.auto == "dense"]
    for dtype in ("float32", "bfloat16"):
        some = [case for case in dense if case["dtype"] == dtype]
        title = f"time / PEFT LoRA of rank E r, where auto is dense, {NAMES[dtype]}"
        yield goal(title, 1.0, some, lambda case: case.ratio("dense", "peft"))
    for dtype in ("float32", "bfloat16"):
        some = [case for case in dense if case["dtype"] == dtype and int(case["in_features"]) >= 3072]
        title = f"time / FLOP bound, 3072² and above, where auto is dense, {NAMES[dtype]}"
        yield goal(title, 1.15, some, lambda case: case.ratio("dense") / float(case["bound"]))
    yield goal("auto / the better of dense and grouped", 1.1, trained, lambda case: case.over_best)
    yield goal("saved for backward / PEFT's", 1.6, trained, lambda case: case.over_peft("saved_mb"))
    yield goal("peak / PEFT's", 1.0, trained, lambda case: case.over_peft("peak_mb"))
    for heap, some in (("default", trained), ("kept", kept)):
        large = [c for c in some if (c["experts"], c["in_features"], c["tokens"]) == ("20", "1024", "8192")]
        yield goal(f"loop / auto, heap {heap}", 6.0, large, lambda case: case.ratio("loop", case.auto), least=True)
    yield goal("latency added to one token / PEFT's", 1.5, decoded, lambda case: float(case.rows[case.auto]["added"]))


def report(rows: list[Row]) -> str:
    """Everything between the markers."""
    every = cases(rows)
    default = [case for case in every if case["heap"] == "default"]
    trained, decoded = ([case for case in default if case["mode"] == mode] for mode in ("train", "decode"))
    kept = [case for case in every if case["heap"] == "kept" and case["mode"] == "train"]
    grid = [case for case in trained if case["tokens"] in ("512", "2048", "8192") and _in_grid(case)]
    swept = [case for case in trained if case not in grid]
    parts = [
        [origin(rows)],
        goals(grid, kept, decoded),
        ["Training, forward and backward, as multiples of the frozen base layer's time:"],
        training_table(grid),
        ["The same with glibc's heap kept:"],
        training_table(kept),
        ["Sweeps over tokens, experts and ranks (plotted below):"],
        training_table(swept),
        ["Decoding one token with a frozen adapter, forward alone, as multiples of the base layer's time:"],
        decoding_table(decoded),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _in_grid(case: Case) -> bool:
    return (case["experts"], case["top_k"], case["rank"]) in {
        ("20", "10", "4"),
        ("8", "2", "4"),
        ("64", "4", "8"),
        ("64", "2", "16"),
    }


def origin(rows: list[Row]) -> str:
    """When, on what and with what they were measured."""
    first, commits = rows[0], ", ".join(sorted({row["commit"] for row in rows}))
    return f"Measured {first['date']} on {first['hardware']}; {first['versions']}; commit {commits}."


def optimizer_goals(
    whole: dict[str, Row], flat: dict[str, Row], threads: dict[str, Row], offload: dict[str, Row]
) -> Iterator[str]:
    """The goals for 2,240 pairs, met by the default, the C++ kernels, and by torch's batched products."""
    yield '| goal | bound | default | `kernels="torch"` |'
    yield "|---|---|---|---|"
    for title, bound, rows in (
        ("step / torch's fused AdamW, no ZeRO", 1.35, whole),
        ("step / torch's fused AdamW, flat ZeRO-2 partition of one rank", 0.9, flat),
    ):
        figures = [float(rows[name]["ratio"]) for name in ("cpp", "eager")]
        yield f"| {title} | <= {bound:g} | " + " | ".join(_verdict(f, f <= bound) for f in figures) + " |"
    figures = [float(whole["loop"]["ratio"]) / float(whole[name]["ratio"]) for name in ("cpp", "eager")]
    yield "| pair by pair, published form / step | >= 20 | " + " | ".join(_verdict(f, f >= 20) for f in figures) + " |"
    for title, bound, figure in (
        ("step / torch's fused AdamW, no ZeRO, 2 threads, elapsed time", 1.35, float(threads["cpp"]["ratio"])),
        ("training step with CPU offload / the same with DeepSpeedCPUAdam", 1.1, float(offload["cpp"]["ratio"])),
    ):
        yield f"| {title} | <= {bound:g} | {_verdict(figure, figure <= bound)} | |"


def _verdict(figure: float, met: bool) -> str:
    return f"**{figure:.2f}** ({'met' if met else 'missed'})"


def optimizer_table(cases: list[dict[str, Row]]) -> Iterator[str]:
    """One row for each case of bench_optimizer.py."""
    yield (
        '| part, optimizer | modules | E, r | features | ranks | torch\'s, ms | default | `kernels="torch"` |'
        " pair by pair | torch's, flat | rows, MFLOPs of a rank |"
    )
    yield "|---" * 11 + "|"
    for rows in cases:
        case = rows["torch"]
        columns = [f"{case['part']}, {case['optimizer']}", case["modules"], f"{case['experts']}, {case['rank']}"]
        ratios = [f"{float(rows[way]['ratio']):.2f}" if way in rows else "" for way in WAYS]
        eager = rows.get("eager", case)
        work = f"{eager['rows_per_rank']}, {float(eager['flops_per_rank']) / 1e6:.0f}" if eager["rows_per_rank"] else ""
        times = [case["features"], case["ranks"], f"{float(case['median_ms']):.1f}", *ratios, work]
        yield "| " + " | ".join([*columns, *times]) + " |"


def optimizer_report(rows: list[Row]) -> str:
    """Everything between the optimizer's markers; the first cases are those that the goals are about."""
    found: dict[object, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(case_of(row), {})[row["contender"]] = row
    cases = list(found.values())
    firsts = (next(case for case in cases if case["torch"]["part"] == part) for part in PARTS)
    parts = [[origin(rows)], optimizer_goals(*firsts), optimizer_table(cases)]
    return "\n\n".join("\n".join(part) for part in parts)


def fill_in(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    path = ROOT / "README.md"
    page = fill_in(path.read_text(), "layer", report(read_rows(RESULTS / "layer.csv")))
    path.write_text(fill_in(page, "optimizer", optimizer_report(read_rows(RESULTS / "optimizer.csv"))))


if __name__ == "__main__":
    main()
