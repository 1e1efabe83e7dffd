"""Where the adapter meets expert parallelism without knowing it: what a shard of experts is, and who builds it.

The adapter (`adapters`) owns router, gates and the pair's tag; it asks for a module that holds E / ep_size experts and
mixes over all E of them together with its peers. That module needs DeepSpeed's groups, so `parallel` provides it, and
`plugin.register` puts the two together by `register_shard_builder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..pairs import GateSettings

DISPATCHES = ("auto", "weights", "tokens")
COMPUTES = ("auto", "dense", "grouped", "compiled")
FACTORS = ("lora_A", "lora_B")
INITIAL_FACTORS = ("initial_A", "initial_B")


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """What one rank's experts of one layer are.

    Args:
        layer_name: the layer's qualified name, for messages.
        num_experts: E over all ranks. ep_size: ranks that share them. top_k: k.
        in_features: I. out_features: O. rank: R of one expert.
        dispatch: "weights", "tokens" or "auto". compute: one of COMPUTES.
        keeps_start: the factors of the start are kept beside the trained ones, as `initial_A` and `initial_B`.
        bucket_layers: layers whose experts are gathered together.
    """

    layer_name: str
    num_experts: int
    ep_size: int
    top_k: int
    in_features: int
    out_features: int
    rank: int
    dispatch: str
    bucket_layers: int
    compute: str
    keeps_start: bool = False


class ExpertShard(Protocol):
    """A module with E / ep_size experts of a layer: `lora_A` (E_local, I, R) and `lora_B` (E_local, O, R)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    first_expert: int

    def mark(self) -> None:
        """Puts DeepSpeed's marks for expert parameters on lora_A and lora_B (again)."""

    def prefetch(self, x: Tensor) -> None:
        """Starts whatever communication can run beside the base layer; x: (..., I)."""

    def mix(
        self,
        base_out: Tensor,
        x: Tensor,
        gates: Tensor,
        chosen: Tensor,
        scaling: float,
        settings: GateSettings | None,
        inplace: bool,
    ) -> Tensor:
        """`mixture.moe_lora.moe_lora` over all E experts. Every rank of the group must call it equally often."""

    def add_mean(self, y: Tensor, x: Tensor, scaling: float) -> Tensor:
        """y + (scaling / E) sum_i B_i A_i x over all E experts of the start. Every rank must call it equally often."""

    def gather(self, name: str) -> Tensor | None:
        """All E experts of "lora_A" or another factor, on the CPU of the group's first rank; None elsewhere."""

    def local_entries(self, prefix: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's entries of `state_dict()` under `prefix`, cut from whole tensors {"lora_A": (E, I, R), ...}."""


ShardBuilder = Callable[[ShardSpec], Any]
_builder: ShardBuilder | None = None


def register_shard_builder(builder: ShardBuilder | None) -> None:
    """Sets who builds the modules of `ep_size > 1`; None: nobody can."""
    global _builder
    _builder = builder


def build_shard(spec: ShardSpec) -> Any:
    """The shard of the running rank: an `nn.Module` that is an `ExpertShard`.

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
