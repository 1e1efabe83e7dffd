"""Finds the pairs among an optimizer's parameters, by the tags of `pairs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..pairs import LoraPair, tag_of

REMEDY = (
    "Call get_peft_model first, and ds_moelora.tag_lora_pairs(model) too if you build the optimizer yourself. Give it "
    "both lora_A and lora_B (model.parameters() that require gradients)."
)


@dataclass(frozen=True, eq=False)
class Factor:
    """A trained parameter that is the A or B of a pair: (E, n, r) elements, n = in or out.

    Args:
        param: as the model has it. pair, role: its tag; the role is "A" or "B".
        group: number of its parameter group.
        partner: index of the pair's other factor among the optimizer's.
    """

    param: nn.Parameter
    pair: LoraPair
    role: str
    group: int
    partner: int

    @property
    def num_experts(self) -> int:
        return self.pair.num_experts

    @property
    def rank(self) -> int:
        return self.pair.rank

    @property
    def rank_first(self) -> bool:
        """Stored (E, r, n) instead of (E, n, r)."""
        return self.pair.rank_first_A and self.role == "A"

    @property
    def experts_last(self) -> bool:
        """Stored (n, r, E) instead of (E, n, r)."""
        return self.pair.rank_first_A and self.role == "B" and self.num_experts > 1


def collect_pairs(members: Mapping[int, Sequence[nn.Parameter]]) -> list[Factor]:
    """All trained factors of all pairs, A and B next to each other, in the order of the parameters.

    Args:
        members: the parameters of each group, by the group's number.

    Raises:
        ValueError: there is no pair, one factor of a pair is missing, or frozen while the other is trained, or a
            factor is a DTensor.
    """
    found: dict[LoraPair, dict[str, tuple[nn.Parameter, int]]] = {}
    for index, params in members.items():
        for param in params:
            tag = tag_of(param)
            if tag is not None and tag[1] != "router":
                found.setdefault(tag[0], {})[tag[1]] = (param, index)
    if not found:
        raise ValueError(f"none of the optimizer's parameters belongs to a LoRA pair. {REMEDY}")
    factors: list[Factor] = []
    for pair, halves in found.items():
        if _is_trained(pair, {role: param for role, (param, _) in halves.items()}):
            for k, role in enumerate("AB"):
                param, group = halves[role]
                factors.append(Factor(param, pair, role, group, partner=len(factors) + 1 - 2 * k))
    return factors


def _is_trained(pair: LoraPair, halves: Mapping[str, nn.Parameter]) -> bool:
    """Whether a pair is trained.

    Raises:
        ValueError: see `collect_pairs`.
    """
    for role, param in halves.items():
        if hasattr(param, "device_mesh"):
            raise ValueError(
                f"{pair.name}: lora_{role} is a DTensor (FSDP or tensor parallelism), on whose shards this optimizer "
                "would not be exact; shard with DeepSpeed ZeRO instead."
            )
    if len(halves) < 2:
        (role,) = halves
        missing = "B" if role == "A" else "A"
        raise ValueError(
            f"{pair.name}: the optimizer has lora_{role} but not lora_{missing}; a Riemannian step needs both. {REMEDY}"
        )
    trained = {role: param.requires_grad for role, param in halves.items()}
    if trained["A"] != trained["B"]:
        frozen = "B" if trained["A"] else "A"
        raise ValueError(f"{pair.name}: lora_{frozen} is frozen while its partner is trained; freeze both or neither.")
    return trained["A"]
