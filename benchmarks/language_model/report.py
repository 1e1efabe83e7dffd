"""Writes the tables between the markers of docs/language_model.md, and its plots, from language_model.csv.

python -m benchmarks.language_model.report
python -m benchmarks.language_model.report --results FILE --document outputs/language_model/report.md
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from ..convergence.report import bare, fill, origin
from ..convergence.results import Cell, Cells, Difference, mean_and_deviation, numbers
from ..convergence.tables import table
from ..harness import RESULTS, ROOT, Row, read_rows
from ..study import SEEDS, TUNING_SEED, rung, rung_number
from . import plan as plans
from .runs import FAILED_LOSS, Run

DOCUMENT = ROOT.parent / "docs" / "language_model.md"
OPEN = tuple(field.name for field in fields(Run) if field.name not in ("seed", "lr", "device"))
ALL = (*plans.MAIN, "SGD", *plans.MORE)
SHAPES = (plans.SOURCE, *plans.FAR, *plans.NEARER)
KEPT_GAIN = 0.9  # the valley is where that share of the gain is kept
TASKS = {"mawps": "MAWPS", "skills": "several skills", "gsm8k": "GSM8K"}


class Study:
    """The rows of one size, cell by cell; where several devices made one, that of the file's first row comes first."""

    def __init__(self, rows: list[Row], size: str = "full") -> None:
        self.devices = list(dict.fromkeys(row["device"] for row in rows))
        self.rows = sorted(rows, key=lambda row: self.devices.index(row["device"]))
        failed = {"train_loss": "inf"}
        rated = [row if float(row["train_loss"]) <= FAILED_LOSS else {**row, **failed} for row in self.rows]
        self.size, self.cells = size, Cells(rated, OPEN)

    def run(self, task: str, method: str, **options: object) -> Run:
        """A cell's key."""
        return plans.cell(self.size, "", task, method, **options)

    def cell(self, task: str, method: str, **options: object) -> Cell:
        """A cell; empty if the file has none."""
        return self.cells[self.run(task, method, **options)]

    def mark(self, rows: list[Row]) -> str:
        """An asterisk, if not all rows are of the first device."""
        return "" if all(row["device"] == self.devices[0] for row in rows) else " \\*"


def settled(cell: Cell) -> bool:
    """Whether the search for the rate has ended: rungs on both sides of the best were tried."""
    tried = {rung_number(float(row["lr"])) for row in cell.rows if row["seed"] == str(TUNING_SEED)}
    best = None if cell.lr is None else rung_number(cell.lr)
    return best is not None and {best - 1, best + 1} <= tried


def entry(cell: Cell, column: str, factor: float = 1.0, digits: int = 3) -> str:
    """Mean and deviation of a column over the reported seeds."""
    values = [factor * value for value in cell.values(column)]
    return mean_and_deviation(values, digits) if values and not any(map(math.isnan, values)) else "-"


def steps_to(cell: Cell, goal: float) -> float | None:
    """The share of the run after which the mean curve is below a loss, at the centres of its parts; None: never."""
    curves = cell.curves()
    means = [statistics.fmean(values) for values in zip(*curves, strict=True)] if curves else []
    below = next((i for i, value in enumerate(means) if value <= goal), None)
    return None if below is None else (below + 0.5) / len(means)


def progress(study: Study) -> str:
    """How much of the plan the file has."""
    keys = Counter(row["study"] for row in study.rows)

    def rows() -> Iterator[Sequence[str]]:
        for name, jobs in plans.plan(study.size):
            cells = [study.cells[run] for procedure, run in jobs if procedure in (plans.tuned, plans.tuned_near)]
            done = f"{sum(bool(cell.reported) for cell in cells)} of {len(cells)}" if cells else ""
            yield name, str(keys[name]), done

    return table(("study", "runs in the file", "methods with three seeds at the tuned rate"), rows())


def methods(study: Study, task: str, names: Sequence[str], **options: object) -> str:
    """Losses, answers and rates of some methods, and how each differs from AdamW on the mixture."""
    base = study.cell(task, "AdamW", **options)
    goal = statistics.fmean(base.values("train_loss")) if base.reported else math.nan

    def rows() -> Iterator[Sequence[str]]:
        start = study.cell(task, "AdamW").at(0.0)
        if start and not options:
            shown = [f"{float(start[0][name]):.3f}" for name in ("train_loss", "test_loss")]
            yield "before training", *shown, f"{100 * float(start[0]['test_accuracy'] or 'nan'):.1f}", "", "", "", ""
        for name in names:
            cell = study.cell(task, name, **options)
            if not cell.reported:
                continue
            share = steps_to(cell, goal)
            yield (
                f"{name} ({cell.lr:g}){study.mark(cell.reported)}",
                entry(cell, "train_loss"),
                entry(cell, "test_loss"),
                entry(cell, "test_accuracy", 100, 1),
                "" if cell is base else str(Difference.of(cell, base, "train_loss")),
                "" if cell is base else str(Difference.of(cell, base, "test_loss")),
                "never" if share is None else f"{share * int(cell.rows[0]['steps']):.0f}",
                f"{statistics.fmean(float(r['seconds']) / int(r['steps']) for r in cell.reported):.3f}",
            )

    head = ("method (rate)", "training loss", "test loss", "right, %", "training loss - AdamW's", "test loss - AdamW's")
    return table((*head, "steps to AdamW's loss", "s per step"), rows())


CHANGES: dict[str, dict[str, object]] = {  # from 2 of 8 experts, routers at the experts' rate
    "k = E / 2 = 4": {"top_k": 4},
    "k = E = 8": {"top_k": 8},
    "routers at a thousandth": {"gate_lr_scale": 1e-3},
}


def changes(study: Study) -> str:
    """What another k, or slow routers, change: each method against itself."""

    def rows() -> Iterator[Sequence[str]]:
        for change, options in CHANGES.items():
            for name in ALL:
                cell, usual = study.cell("mawps", name, **options), study.cell("mawps", name)
                if cell.reported:
                    columns = ("train_loss", "test_loss")
                    figures = (*(entry(cell, column) for column in columns), entry(cell, "test_accuracy", 100, 1))
                    differences = (str(Difference.of(cell, usual, column)) for column in columns)
                    yield f"{change}: {name} ({cell.lr:g}){study.mark(cell.reported)}", *figures, *differences

    head = ("change: method (rate)", "training loss", "test loss", "right, %")
    return table((*head, "training loss - without the change", "test loss - without"), rows())


def once(study: Study, task: str, names: Sequence[str], **options: object) -> str:
    """One seed at MAWPS's rate."""

    def rows() -> Iterator[Sequence[str]]:
        for name in names:
            for row in study.cell(task, name, **options).at(rung(plans.first_rung(study.run(task, name))), SEEDS[0]):
                figures = [f"{float(row[column]):.3f}" for column in ("train_loss", "test_loss")]
                right = f"{100 * float(row['test_accuracy']):.1f}"
                yield f"{name} ({row['lr']}){study.mark([row])}", *figures, right, row["gate_cv"]

    return table(("method (rate), seed 1", "training loss", "test loss", "right, %", "gates' deviation / mean"), rows())


def devices(study: Study) -> str:
    """What the device alone changes: runs that are equal but for it."""

    def rows() -> Iterator[Sequence[str]]:
        for name in plans.ON_BOTH:
            cell = study.cell("mawps", name)
            by_seed = [cell.at(lr, seed) for lr in sorted({float(r["lr"]) for r in cell.rows}) for seed in SEEDS]
            for found in by_seed:
                if len(found) > 1:
                    columns = ("train_loss", "test_loss", "test_accuracy", "gate_cv")
                    pairs = [" / ".join(f"{float(row[column] or 'nan'):.3f}" for row in found) for column in columns]
                    yield f"{name} ({found[0]['lr']}), seed {found[0]['seed']}", *pairs

    head = ("run", "training loss", "test loss", "right, share", "gates' deviation / mean")
    return table((f"{head[0]}: {' / '.join(study.devices)}", *head[1:]), rows())


def width(cell: Cell, start: float) -> str:
    """By what factor the rate may be too low, or too high, before a tenth of the gain over `start` is lost (seed 0)."""
    tried = {float(r["lr"]): float(r["train_loss"]) for r in cell.rows if r["seed"] == str(TUNING_SEED)}
    if cell.lr is None or not settled(cell):
        return "-"
    bound = start - KEPT_GAIN * (start - tried[cell.lr])
    edges = []
    for rates in (
        sorted((lr for lr in tried if lr <= cell.lr), reverse=True),
        sorted(lr for lr in tried if lr >= cell.lr),
    ):
        inside, edge = cell.lr, None
        for lr in rates[1:]:
            if tried[lr] > bound:
                edge = lr
                break
            inside = lr
        factor = max(inside, cell.lr) / min(inside, cell.lr)
        edges.append(f"{factor:.1f}" if edge else f"> {factor:.1f}")
    return f"1 / {edges[0]} to {edges[1]}"


def valleys(study: Study) -> str:
    """The width of each method's valley."""
    start = untrained_loss(study)

    def rows() -> Iterator[Sequence[str]]:
        for name in ALL:
            cell = study.cell("mawps", name)
            if settled(cell) and not math.isnan(start):
                yield name, f"{cell.lr:g}", width(cell, start)

    return table(("method", "best rate, seed 0", "rates that keep nine tenths of the gain, times the best"), rows())


def untrained_loss(study: Study) -> float:
    """The training loss of runs at rate 0."""
    rows = study.cell("mawps", "AdamW").at(0.0)
    return float(rows[0]["train_loss"]) if rows else math.nan


def transfers(study: Study) -> str:
    """What the rate found at r = 4, half the layers, E = 8 costs in other shapes, against their own best rates."""

    def cost(method: str, shape: dict[str, int]) -> str:
        source, cell = (study.cell("mawps", method, **options) for options in (plans.SOURCE, shape))
        if not (settled(source) and settled(cell)) or source.lr is None or cell.lr is None:
            return "-"
        moved = "" if cell.lr == source.lr else f" (best at x {cell.lr / source.lr:.2g})"
        loss = losses_at(cell, source.lr)
        return f"{loss:.3f}, +{loss - losses_at(cell, cell.lr):.3f}{moved}"

    rows = ((shape_name(s), *(cost(method, s) for method in plans.TRANSFER_METHODS)) for s in plans.FAR + plans.NEARER)
    return table(("shape", *plans.TRANSFER_METHODS), rows)


def shape_name(shape: dict[str, int]) -> str:
    """Of a shape that rates are transferred to."""
    return f"r = {shape['r']}, {shape['layers'] or 'all'} layers, E = {shape.get('num_experts', 8)}"


def rungs(study: Study) -> str:
    """The losses of seed 0, shape by shape, at all rates that were tried in more than one."""
    found = {}
    for name in plans.TRANSFER_METHODS:
        for shape in SHAPES:
            rows = [row for row in study.cell("mawps", name, **shape).rows if row["seed"] == str(TUNING_SEED)]
            found[f"{name}, {shape_name(shape)}"] = {float(row["lr"]): float(row["train_loss"]) for row in rows}
    shapes = Counter(lr for losses in found.values() for lr in losses)
    rates = sorted(lr for lr, number in shapes.items() if number > 1)
    text = {name: [f"{losses[lr]:.3f}" if lr in losses else "" for lr in rates] for name, losses in found.items()}
    return table(("seed 0", *(f"{lr:g}" for lr in rates)), ((name, *row) for name, row in text.items() if any(row)))


SCALED = (  # plain, scaled, power of the gate, k
    ("RSGD", "gRSGD (sqrt)", 0.5, 2),
    ("RSGD", "gRSGD (full)", 1.0, 2),
    ("RAdamW", "gRAdamW (sqrt)", 0.5, 2),
    ("RAdamW", "gRAdamW (full)", 1.0, 2),
    ("Muon", "gMuon (sqrt)", 0.5, 2),
    ("Muon", "gMuon (full)", 1.0, 2),
    ("RSGD", "gRSGD (full)", 1.0, 8),
    ("RAdamW", "gRAdamW (full)", 1.0, 8),
)


def gates(study: Study) -> str:
    """What a constant factor alone would do to the best rate and the loss, and what the scaling did."""

    def rows() -> Iterator[Sequence[str]]:
        for plain, scaled, power, k in SCALED:
            a, b = (study.cell("mawps", name, top_k=k) for name in (plain, scaled))
            if not settled(a) or not settled(b) or a.lr is None or b.lr is None:
                continue
            # Gates are about 1 / k: "none" leaves the gradient g times too small for SGD, "full" not at all.
            predicted = (1 / k) ** power if "SGD" in plain else 1.0
            alike = losses_at(b, a.lr) - losses_at(a, a.lr)
            yield (
                f"{scaled} - {plain}, k = {k}",
                f"x {predicted:.2f}",
                f"x {b.lr / a.lr:.2f}",
                "-" if math.isnan(alike) else f"{alike:+.3f}",
                "0",
                str(Difference.of(b, a, "train_loss")),
            )

    head = (
        "difference",
        "best rate predicted",
        "measured",
        "loss at the rate of none, seed 0",
        "loss tuned: predicted",
    )
    return table((*head, "measured"), rows())


def preconditioning(study: Study) -> str:
    """What the preconditioner alone does, without gate scaling."""

    def rows() -> Iterator[Sequence[str]]:
        for plain in ("SGD", "AdamW"):
            a, b = study.cell("mawps", f"R{plain}"), study.cell("mawps", plain)
            if a.reported and b.reported:
                columns = ("train_loss", "test_loss")
                yield f"R{plain} - {plain}", *(str(Difference.of(a, b, column)) for column in columns)

    return table(("difference", "training loss", "test loss"), rows())


def losses_at(cell: Cell, lr: float) -> float:
    """Training loss of seed 0 at a rate."""
    found = [row for row in cell.rows if row["seed"] == str(TUNING_SEED) and float(row["lr"]) == lr]
    return float(found[0]["train_loss"]) if found else math.nan


def spreads(study: Study) -> str:
    """How gates differ in the last quarter of training, at the tuned rate."""

    def rows() -> Iterator[Sequence[str]]:
        for task, k in (("mawps", 2), ("mawps", 4), ("mawps", 8), ("skills", 2)):
            for name in ALL:
                cell = study.cell(task, name, top_k=k)
                if cell.reported and "LoRA" not in name:
                    values = [entry(cell, column, 1, 2) for column in ("gate_cv", "expert_gate_cv", "load_cv")]
                    shared = entry(cell, "mutual_information", 1, 3) if task == "skills" else ""
                    yield f"{TASKS[task]}, k = {k}, {name} ({cell.lr:g})", *values, shared

    head = ("task, method (rate)", "of gates", "of the experts' mean gates", "of the experts' loads")
    return table((*head, "I(skill; expert), bits"), rows())


def starts(study: Study) -> str:
    """GOAT's start and scaling against the usual ones."""

    def rows() -> Iterator[Sequence[str]]:
        for name in ("AdamW", "Muon"):
            goat, usual = (study.cell("mawps", name, start=start) for start in ("goat", "kaiming"))
            if goat.reported and usual.reported:
                tests = (str(Difference.of(goat, usual, column)) for column in ("train_loss", "test_loss"))
                yield f"{name} ({goat.lr:g})", entry(goat, "train_loss"), entry(goat, "test_loss"), *tests

    return table(("method (rate)", "GOAT: training loss", "test loss", "GOAT - Kaiming, training", "test"), rows())


def sections(study: Study) -> dict[str, str]:
    """All tables, by the names of their markers."""
    found = {
        "origin": "\n\n".join(
            f"{device}: {origin([row for row in study.rows if row['device'] == device], 'time')}"
            for device in study.devices
        ),
        "progress": progress(study),
        "MAWPS": methods(study, "mawps", ALL),
        "several skills": methods(study, "skills", ALL),
        "GSM8K": methods(study, "gsm8k", ALL),
        "changes": changes(study),
        "20, 10, 4": once(study, "mawps", plans.ON_BOTH, num_experts=20, top_k=10),
        "devices": devices(study),
        "GOAT": starts(study),
        "valleys": valleys(study),
        "transfer": transfers(study),
        "rungs": rungs(study),
        "preconditioning": preconditioning(study),
        "gates": gates(study),
        "spread": spreads(study),
    }
    empty = {name for name, text in found.items() if text.count("\n") < 2 and name != "origin"}
    return {name: "(no complete rows yet)" if name in empty else text for name, text in found.items()}


def figures(study: Study, folder: Path) -> list[str]:
    """Learning curves, loss over rate, transfer; without matplotlib none."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so nothing was drawn: pip install -e .[bench]")
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    panels: list[tuple[str, str, Callable[..., None]]] = [
        ("training loss over steps, tuned rates", "step", _curves),
        ("training loss over the rate, seed 0", "learning rate", _over_rate),
        ("the same at r = 2 ... 32, E = 2 ... 16", "learning rate", _over_shape),
    ]
    figure, row = plt.subplots(1, len(panels), figsize=(15, 4), layout="constrained")
    for axes, (title, x, draw) in zip(row, panels, strict=True):
        draw(axes, study)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x, fontsize=8)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=6)
        else:
            axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes)
    row[0].set_ylabel("training loss, MAWPS")
    figure.savefig(folder / "language_model.png", dpi=70)
    plt.close(figure)
    return ["language_model.png"]


def _curves(axes: object, study: Study) -> None:
    for i, name in enumerate(ALL):
        cell = study.cell("mawps", name)
        curves = cell.curves()
        if curves:
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            width = int(cell.rows[0]["steps"]) / len(means)
            x = [(j + 0.5) * width for j in range(len(means))]
            axes.plot(x, means, color=f"C{i % 10}", ls="-" if i < 10 else "--", label=f"{name}, {cell.lr:g}", lw=1)  # type: ignore[attr-defined]


def _points(cell: Cell) -> list[tuple[float, float]]:
    rows = [row for row in cell.rows if row["seed"] == str(TUNING_SEED)]
    return sorted(
        (float(r["lr"]), v) for r, v in zip(rows, numbers(rows, "train_loss"), strict=True) if math.isfinite(v)
    )


def _over_rate(axes: object, study: Study) -> None:
    for i, name in enumerate(ALL):
        points = _points(study.cell("mawps", name))
        if len(points) > 1:
            axes.semilogx(*zip(*points, strict=True), ".-", color=f"C{i % 10}", label=name, lw=1)  # type: ignore[attr-defined]


def _over_shape(axes: object, study: Study) -> None:
    for i, name in enumerate(plans.TRANSFER_METHODS):
        found = [_points(study.cells[replace(study.run("mawps", name), **shape)]) for shape in SHAPES]
        for j, points in enumerate(found if found[0] else []):
            if len(points) > 1:
                label = name if j == 0 else None
                axes.semilogx(*zip(*points, strict=True), ".-", color=f"C{i}", alpha=0.6, label=label, lw=1)  # type: ignore[attr-defined]


def write(rows: list[Row], document: Path, images: Path, size: str = "full") -> None:
    """Tables and plots."""
    study = Study(rows, size)
    tables, drawn = sections(study), figures(study, images)
    text = document.read_text() if document.exists() else bare(tables, drawn)
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(fill(text, tables))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "language_model.csv", help="%(default)s")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="%(default)s")
    args = parser.parse_args(argv)
    rows = read_rows(args.results)
    if not rows:
        parser.error(f"--results {args.results}: no rows; run python -m benchmarks.bench_language_model first.")
    images = DOCUMENT.parent / "images" if args.document == DOCUMENT else args.document.parent
    write(rows, args.document, images)


if __name__ == "__main__":
    main()
