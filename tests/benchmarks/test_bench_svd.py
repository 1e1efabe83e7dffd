"""The benchmark's figures on a tiny weight: both algorithms are there, and as accurate as the documentation says."""

from __future__ import annotations

from benchmarks import bench_svd


def test_rows_of_one_layer() -> None:
    for spectrum in ("flat", "decaying"):
        rows = bench_svd.layer_rows((48, 40), spectrum, repeats=1)
        assert [(row["variant"], row["algorithm"]) for row in rows] == [
            (variant, algorithm) for variant in bench_svd.VARIANTS for algorithm in ("full fp32", "gram")
        ]
        for row in rows:
            bound = 1e-2 if row["algorithm"] == "full fp32" else 1e-9
            assert max(row["error_S"], row["error_experts"]) < bound
            assert row["relative_time"] > 0
