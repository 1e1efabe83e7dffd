"""What one process's share of a layer's experts is, and who builds it. Needs no DeepSpeed.

The adapter (`tuner`) owns router, gates and the pair's tag; with `ep_size > 1` it asks for a module that holds E /
ep_size experts and mixes over all E of them together with its peers, a `shard.ShardedExperts`. That is a subclass of a
class of DeepSpeed's, and needs DeepSpeed's engine patched: `plugin.register` says by `register_shard_builder` who does
both, so that the package works without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DISPATCHES = ("auto", "weights", "tokens")
FACTORS = ("lora_A", "lora_B")
INITIAL_FACTORS = ("initial_A", "initial_B")


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """What one rank's experts of one layer are.

    Args:
        layer_name: the layer's qualified name, for messages.
        num_experts: E over all ranks. ep_size: ranks that share them. top_k: k.
        in_features: I. out_features: O. rank: R of one expert.
        dispatch: one of DISPATCHES. compute: one of `mixture.choice.COMPUTES`.
        keeps_start: the factors of the start are kept beside the trained ones, as `initial_A` and `initial_B`.
    """

    layer_name: str
    num_experts: int
    ep_size: int
    top_k: int
    in_features: int
    out_features: int
    rank: int
    dispatch: str
    compute: str
    keeps_start: bool = False


_builder: Callable[[ShardSpec], Any] | None = None


def register_shard_builder(builder: Callable[[ShardSpec], Any] | None) -> None:
    """Sets who builds the modules of `ep_size > 1`; None: nobody can."""
    global _builder
    _builder = builder


def build_shard(spec: ShardSpec) -> Any:
    """The shard of the running process: a `shard.ShardedExperts`.

    Raises:
        ValueError: nobody can build it here, or `ep_size` does not fit the experts or the world size.
    """
    if _builder is None:
        raise ValueError(
            f"ep_size={spec.ep_size} needs DeepSpeed, which is not installed: pip install deepspeed, or use ep_size=1."
        )
    return _builder(spec)


def check_ep_size(ep_size: int, num_experts: int, world_size: int | None = None) -> None:
    """Checks that every rank gets equally many experts.

    Args:
        world_size: None: not known yet, only the experts are looked at.

    Raises:
        ValueError: naming the sizes that would do.
    """
    fitting = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    where = f"num_experts={num_experts}"
    if world_size is not None:
        fitting = [n for n in fitting if world_size % n == 0]
        where += f" on {world_size} rank{'s' if world_size > 1 else ''}"
    if ep_size not in fitting:
        both = "num_experts" if world_size is None else "num_experts and the number of ranks"
        raise ValueError(
            f"ep_size={ep_size} must divide {both}; with {where} these sizes do: {', '.join(map(str, fitting))}."
        )
