"""Drawn shapes, ranks, numbers of experts, group orders, world sizes and stages, on real ranks."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support.mixture import SHAPES, Stack
from ..support.ranks import run_on_ranks
from ..support.training import (
    SHARDED,
    deviation,
    engine_config,
    loraplus_groups,
    one_group,
    run_engine,
    run_reference,
    scattered_groups,
)

pytestmark = pytest.mark.dist

widths = st.integers(2, 13)  # LayerNorm of one feature has no gradient
layer = st.tuples(widths, st.integers(1, 5), st.integers(1, 7))  # out, experts, rank


@given(
    layers=st.lists(layer, min_size=1, max_size=4),
    top_k=st.integers(1, 3),
    world=st.integers(1, 4),
    stage=st.integers(0, 3),
    kind=st.sampled_from(SHARDED),
    groups=st.sampled_from([one_group, loraplus_groups, scattered_groups]),
)
@settings(max_examples=24, deadline=None, derandomize=True)
def test_any_stack(
    layers: list[tuple[int, int, int]], top_k: int, world: int, stage: int, kind: str, groups: object
) -> None:
    """Two steps from the same weights; ranks above in and out are among the draws."""
    shapes, in_features = [], SHAPES[0][0]
    for out_features, experts, rank in layers:
        shapes.append((in_features, out_features, experts, rank))
        in_features = out_features
    model = functools.partial(Stack, shapes, top_k=top_k)
    config = engine_config(stage, kind)
    results = run_on_ranks(world, run_engine, config=config, model=model, groups=groups, steps=2)
    reference = run_reference(kind, world, model=model, groups=groups, steps=2)["weights"]
    # Singular Gram matrices (rank above a width) are solved in fp32 to eps * trace / damping only: test_numerics.py.
    singular = any(rank > min(i, o) for i, o, _, rank in shapes)
    assert max(deviation(result["weights"], reference) for result in results) < (1e-2 if singular else 1e-4)
