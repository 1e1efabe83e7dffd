"""Which expert-parallel groups lie on several nodes, although they would fit on one: integers and names, no groups.

DeepSpeed makes groups of ep_size consecutive ranks, or, with `use_data_before_expert_parallel_`, of every
(world / ep_size)-th rank. Launchers number the ranks of one node consecutively. So groups stay inside nodes if every
node has a multiple of ep_size ranks; the exchange of every layer, forward and backward, then needs no network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


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
