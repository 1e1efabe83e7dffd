"""DeepSpeed's expert-parallel and expert-data-parallel process groups, and what is used of its private functions.

DeepSpeed makes groups of ep_size consecutive ranks, or, with `use_data_before_expert_parallel_`, of every
(world / ep_size)-th rank. Launchers number the ranks of one node consecutively. So groups stay inside nodes if every
node has a multiple of ep_size ranks; the exchange of every layer, forward and backward, then needs no network.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

logger = logging.getLogger("ds_moelora")
TESTED_VERSIONS = "0.19.8"
NEEDED = ("_create_expert_and_data_parallel", "_get_expert_parallel_group_dict", "_get_expert_data_parallel_group")


def check_deepspeed() -> None:
    """Looks for the functions of DeepSpeed's that expert parallelism calls.

    Raises:
        ValueError: one is missing; the message names it and the tested versions.
    """
    missing = [name for name in NEEDED if not hasattr(groups, name)]
    if missing:
        raise ValueError(
            f"expert parallelism needs {', '.join(missing)}, which this DeepSpeed ({metadata.version('deepspeed')}) "
            f"does not have; it was made for {TESTED_VERSIONS}. Use that version, or ep_size=1."
        )


def expert_parallel_group(name: str) -> dist.ProcessGroup | None:
    """The group called `name` of the processes that share one copy of the experts with this one.

    None before an engine has created it.
    """
    return groups._get_expert_parallel_group_dict().get(name)


def expert_data_group(name: str) -> dist.ProcessGroup:
    """The processes that hold the same experts as this one."""
    return groups._get_expert_data_parallel_group(name)


def create_groups(ep_size: int, data_before_expert: bool) -> None:
    """Creates DeepSpeed's expert-parallel and expert-data-parallel groups, unless they are there."""
    name = f"ep_size_{ep_size}"
    if expert_parallel_group(name) is None:
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
        _look_at_nodes(expert_parallel_group(name), data_before_expert)


def _look_at_nodes(group: dist.ProcessGroup | None, data_before_expert: bool) -> None:
    """Warns, on the first process, of groups that lie on several nodes without need."""
    assert group is not None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), dist.get_process_group_ranks(group)))
    members = sorted({tuple(ranks) for _, ranks in found})
    message = explain_split(members, [node for node, _ in found], data_before_expert)
    if message and dist.get_rank() == 0:
        logger.warning(message)


def split_groups(groups: Iterable[Sequence[int]], nodes: Sequence[str]) -> list[list[int]]:
    """The groups whose ranks lie on more than one node. nodes: the node of every rank."""
    return [list(group) for group in groups if len({nodes[rank] for rank in group}) > 1]


def explain_split(groups: Sequence[Sequence[int]], nodes: Sequence[str], data_before_expert: bool) -> str | None:
    """What to tell the user about groups that lie on several nodes and would fit on one; None if there are none.

    Args:
        groups: expert-parallel groups, all of one size. nodes: the node of every rank.
        data_before_expert: the user asked for DeepSpeed's other order of ranks, which is respected.
    """
    split, ep_size = split_groups(groups, nodes), len(groups[0])
    sizes = Counter(nodes)
    if not split or ep_size > max(sizes.values()):
        return None
    if data_before_expert:
        why = "use_data_before_expert_parallel_ asks for ranks far apart; without it groups are consecutive ranks."
    elif any(size % ep_size for size in sizes.values()):
        counts = ", ".join(f"{node} {size}" for node, size in sizes.items())
        why = f"Ranks per node ({counts}) are no multiples of {ep_size}; change the slots in the host file, or ep_size."
    else:
        why = "Ranks of one node are not consecutive: mpirun --map-by slot, srun --distribution=block."
    first = ", ".join(f"{rank} ({nodes[rank]})" for rank in split[0])
    return (
        f"{len(split)} of {len(groups)} expert-parallel groups of {ep_size} ranks lie on several nodes, such as ranks "
        f"{first}: every layer's exchange of experts or tokens crosses the network. {why}"
    )
