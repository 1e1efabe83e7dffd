"""The benchmarks' frame: what it measures, what it writes, and what it calls moved."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

from benchmarks import bench_scaling
from benchmarks.compare import moved
from benchmarks.harness import Results, measure, peak_bytes, read_rows, saved_bytes
from benchmarks.scaling_plot import table, write_scalars

from ..support.ranks import run_on_ranks


def test_ratios_are_taken_within_a_round(tmp_path) -> None:
    """The machine gets slower from round to round; the second contender always takes three times as long."""
    durations = iter([1.0, 1.0, 3.0, 3.0, *[1.0, 3.0], *[30.0, 10.0], *[100.0, 300.0]])  # rotating order
    samples = measure({"one": list, "three": list}, rounds=3, sample_s=0, run=lambda step, calls: next(durations))
    assert samples == {"one": [1, 10, 100], "three": [3, 30, 300]}
    path = tmp_path / "results" / "x.csv"
    Results(path, ["n"], ["peak"]).add({"n": 5}, "one", samples, {"three": {"peak": 7}})
    one, three = read_rows(path)
    assert (three["peer"], float(three["ratio"]), three["peak"], one["peak"]) == ("one", 3, "7", "")
    assert all(three[name] for name in ("date", "commit", "command", "hardware", "versions"))
    again = Results(path, ["n"], ["peak"])
    assert again.has({"n": 5})
    assert not again.has({"n": 6})
    with pytest.raises(ValueError, match="--fresh"):
        Results(path, ["n", "dtype"], ["peak"])
    assert not Results(path, ["n"], ["peak"], fresh=True).has({"n": 5})


def test_what_moved(tmp_path) -> None:
    rows = {}
    for name, three in (("old", 3.0), ("new", 3.5), ("near", 3.2)):
        results = Results(tmp_path / name, ["n"])
        results.add({"n": 5}, "one", {"one": [1.0] * 3, "three": [three] * 3})
        rows[name] = read_rows(tmp_path / name)
    lines, compared = moved(rows["old"], rows["new"], 0.1)
    assert lines == ["n=5: three / one was 3.000, is 3.500 (+17%)"]
    assert compared == 1
    assert moved(rows["old"], rows["near"], 0.1) == ([], 1)
    assert moved([], rows["new"], 0.1) == ([], 0)


def test_memory() -> None:
    x, w = torch.ones(100, 50, requires_grad=True), torch.ones(50, 20, requires_grad=True)
    assert saved_bytes(lambda: (x @ w).exp(), [x, w]) == 100 * 20 * 4
    assert saved_bytes(lambda: (x @ w).exp()) == (100 * 20 + 100 * 50 + 50 * 20) * 4
    assert peak_bytes(lambda: (torch.ones(1000), torch.ones(1000))) == 8000
    assert peak_bytes(lambda: [torch.ones(1000).sum() for _ in range(2)]) == 4004 + 4


def test_the_gpu_script_runs_on_a_cpu(tmp_path) -> None:
    path = tmp_path / "gpu.csv"
    (printed,) = run_on_ranks(1, run_gpu_script, output=str(path))
    assert printed.count("from float64") == 2 * 3 + 1 + 2 * 2  # the routers' losses have kernels alone
    rows = read_rows(path)
    found = {
        part: {row["contender"] for row in rows if row["part"] == part} for part in ("layer", "optimizer", "training")
    }
    assert found == {
        "layer": {"base", "peft", "dense", "grouped", "fused"},
        "optimizer": {"fused AdamW", "torch", "cpp"},
        "training": {"peft", "mixture, torch", "mixture, cpp"},
    }
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert path.with_suffix(".svg").stat().st_size > 1000


def run_gpu_script(output: str) -> str:
    """In a process with a group, which DeepSpeed wants."""
    from benchmarks import bench_gpu

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        bench_gpu.main(["--device", "cpu", "--tiny", "--output", output])
    return printed.getvalue()


def measure_scaling(ep_size: int) -> dict[str, dict[str, float]]:
    """On every rank: one round of the benchmark's contenders."""
    from benchmarks import scaling_worker

    return scaling_worker.measure({"stage": 2, "ep_size": ep_size, "tokens": scaling_worker.SEQUENCE}, 1)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_what_scaling_measures(ep_size: int) -> None:
    first, second = run_on_ranks(2, measure_scaling, ep_size=ep_size)
    for found in (first, second):
        assert all(found[name]["sent"] > 0 and found[name]["memory"] > 0 for name in ("lora", "adamw", "ours"))
        more = found["ours"]["sent"] - found["adamw"]["sent"]
        # The Gram matrices of experts that both processes have a part of; with one owner per expert, none.
        assert 0 <= more <= (0.01 * found["adamw"]["sent"] if ep_size == 1 else 0)
    assert [first[name]["cpu"] for name in first] == [second[name]["cpu"] for name in second]


def test_scaling(tmp_path) -> None:
    """What efficiency and work efficiency mean; one TensorBoard run per way to run, with ranks as the axis."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert {case["tokens"] for case in bench_scaling.cases(2, 1, False, 256) if case["mode"] == "strong"} == {512}
    assert all(case["ep_size"] == 1 for case in bench_scaling.cases(1, 1, False, 256))
    assert {case["world"] for case in bench_scaling.cases(2, 3, True, 256)} == {6}
    path = tmp_path / "x.csv"
    results = Results(path, bench_scaling.CASE, bench_scaling.EXTRAS)
    for world, wall, cpu in ((1, 1.0, 1.0), (4, 2.0, 1.25)):
        case = {"mode": "weak", "stage": 2, "ep_size": 1, "world": world, "tokens": 100}
        found = {"wall": [wall] * 3, "cpu": [cpu] * 3, "sent": 3e6, "collectives": 7.0, "memory": 5e6}
        extras = {name: bench_scaling.extras_of(found, case, name, read_rows(path)) for name in ("lora", "ours")}
        results.add(case, "lora", dict.fromkeys(extras, found["cpu"]), extras)
    rows = read_rows(path)
    assert [float(row["tokens_per_second"]) for row in rows[::2]] == [100, 200]
    assert [(float(row["efficiency"]), float(row["work_efficiency"])) for row in rows[::2]] == [(1, 1), (0.5, 0.8)]
    assert "| ours, ZeRO-2, ep_size 1 | 3.00 / 3.00 | 7 / 7 | 5.0 / 5.0 | 1.0 / 0.8 | 1.0 / 0.5 |" in table(
        rows, "weak"
    )
    write_scalars(rows, tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board" / "weak-zero2-ep1-ours"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("scaling/efficiency")] == [(1, 1), (4, 0.5)]
