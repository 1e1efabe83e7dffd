"""The benchmarks' frame: what it measures, what it writes, and what it calls moved."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare import moved
from benchmarks.harness import Results, measure, peak_bytes, read_rows, saved_bytes


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


def test_the_gpu_script_runs_on_a_cpu(tmp_path, capsys) -> None:
    from benchmarks import bench_gpu

    path = tmp_path / "gpu.csv"
    bench_gpu.main(["--device", "cpu", "--tiny", "--output", str(path)])
    assert capsys.readouterr().out.count("from float64") == 3
    rows = read_rows(path)
    assert {row["contender"] for row in rows} >= {"base", "peft", "dense", "fused AdamW", "GateRiemannianAdamW"}
    assert all(float(row["ratio"]) > 0 for row in rows)
