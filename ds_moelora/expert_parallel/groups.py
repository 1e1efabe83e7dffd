"""DeepSpeed's expert-parallel and expert-data-parallel process groups, and what is used of its private functions."""

from __future__ import annotations

import logging
import socket
from importlib import metadata
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups

from .nodes import explain_split

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
