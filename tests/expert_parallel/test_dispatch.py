"""What "auto" takes under expert parallelism: a rule by bytes, which asks no other process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moelora.expert_parallel.dispatch import USUAL_BYTES, USUAL_TOKENS, bytes_moved, choose_dispatch
from ds_moelora.expert_parallel.spec import ShardSpec


def spec(dispatch: str = "auto", **sizes: Any) -> ShardSpec:
    usual = {"num_experts": 64, "ep_size": 8, "top_k": 2, "in_features": 1024, "out_features": 1024, "rank": 8}
    return ShardSpec(layer_name="layer", dispatch=dispatch, compute="auto", **{**usual, **sizes})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, "weights"),
        ({"num_experts": 8, "rank": 4}, "weights"),
        ({"num_experts": 256, "rank": 32}, "tokens"),
        ({"num_experts": 256, "rank": 32, "top_k": 16}, "weights"),
        ({"num_experts": 512, "rank": 64, "ep_size": 2}, "tokens"),
    ],
)
def test_auto_goes_by_bytes(sizes: dict[str, int], expected: str) -> None:
    assert choose_dispatch(spec(**sizes)) == expected


@given(
    processes=st.sampled_from([2, 4, 8]),
    local=st.integers(1, 64),
    top_k=st.integers(1, 2),
    rank=st.integers(1, 64),
    in_features=st.integers(1, 8192),
)
def test_the_way_taken_moves_the_fewer_bytes(
    processes: int, local: int, top_k: int, rank: int, in_features: int
) -> None:
    sizes = {"num_experts": local * processes, "ep_size": processes, "top_k": top_k, "rank": rank}
    taken = choose_dispatch(spec(in_features=in_features, **sizes))
    moved = bytes_moved(local * processes, processes, top_k, in_features, 1024, rank, USUAL_TOKENS, USUAL_BYTES)
    assert moved[taken] == min(moved.values())


@pytest.mark.parametrize("dispatch", ["weights", "tokens"])
def test_a_field_that_is_set_is_taken(dispatch: str) -> None:
    assert choose_dispatch(spec(dispatch, num_experts=256, rank=32)) == dispatch
    assert choose_dispatch(spec(dispatch)) == dispatch
