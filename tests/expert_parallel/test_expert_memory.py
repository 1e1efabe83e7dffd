"""What benchmarks/memory_expert_parallel.py measures is what its formula says."""

from __future__ import annotations

import pytest

from benchmarks.memory_expert_parallel import formula, measure

from ..support.ranks import run_on_ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("world", "stage", "ep_size", "precision"),
    [(2, 1, 1, "fp32"), (2, 1, 2, "fp32"), (2, 2, 2, "bf16"), (4, 2, 2, "fp32")],
)
def test_measured_memory_is_the_formulas(world: int, stage: int, ep_size: int, precision: str) -> None:
    for found in run_on_ranks(world, measure, stage=stage, ep_size=ep_size, precision=precision):
        assert found == formula(stage, ep_size, world, precision)
