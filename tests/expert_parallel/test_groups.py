"""Expert-parallel groups and nodes: the rank lists that DeepSpeed makes, over nodes of several sizes."""

from __future__ import annotations

import re
from typing import Any

import deepspeed.comm as dist
import pytest
from deepspeed.utils import groups
from hypothesis import given
from hypothesis import strategies as st

from ds_moelora.expert_parallel.groups import explain_split, split_groups


def deepspeed_groups(world: int, ep_size: int, data_before_expert: bool = False) -> list[list[int]]:
    """The expert-parallel groups that DeepSpeed would make, recorded where it would make them."""
    made: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda *_: world)
        patch.setattr(dist, "get_rank", lambda *_: 0)
        patch.setattr(dist, "new_group", lambda ranks: made.append(list(ranks)))
        patch.setattr(groups, "mpu", None)
        patch.setattr(groups, "log_dist", lambda *_, **__: None)
        for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS",
                     "_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS"):  # fmt: skip
            patch.setattr(groups, name, {})
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    return made[ep_size:]  # the first are the expert-data-parallel ones


def node_list(*sizes: int) -> list[str]:
    """Ranks numbered node by node, as every launcher does."""
    return [f"node{i}" for i, size in enumerate(sizes) for _ in range(size)]


def test_rank_lists():
    assert deepspeed_groups(8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert deepspeed_groups(8, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert deepspeed_groups(8, 2, data_before_expert=True) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_groups_stay_inside_nodes_that_they_fill(ep_size: int, multiples: list[int]):
    sizes = [ep_size * multiple for multiple in multiples]
    made = deepspeed_groups(sum(sizes), ep_size)
    assert sorted(rank for group in made for rank in group) == list(range(sum(sizes)))
    assert not split_groups(made, node_list(*sizes))
    assert explain_split(made, node_list(*sizes), False) is None


@pytest.mark.parametrize(
    ("nodes", "ep_size", "data_before_expert", "message"),
    [
        (node_list(3, 3), 2, False, r"1 of 3 .* ranks 2 \(node0\), 3 \(node1\).*node0 3, node1 3.* multiples of 2"),
        (node_list(2, 2), 2, True, r"2 of 2 .* ranks 0 \(node0\), 2 \(node1\).*use_data_before_expert_parallel_"),
        (["a", "b", "a", "b"], 2, False, r"2 of 2 .* ranks 0 \(a\), 1 \(b\).*--map-by slot"),
        (node_list(2, 2), 4, False, None),  # larger than a node: it cannot be helped
        (node_list(1, 1), 2, False, None),
        (node_list(4), 2, True, None),
    ],
)
def test_what_is_said(nodes: list[str], ep_size: int, data_before_expert: bool, message: Any):
    said = explain_split(deepspeed_groups(len(nodes), ep_size, data_before_expert), nodes, data_before_expert)
    if message is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(message, said), said
