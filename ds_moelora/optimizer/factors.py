"""Finds the pairs among an optimizer's parameters, by the tags of `pairs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..pairs import LoraPair, tag_of
from .sharding.placement import Placement
from .sharding.plan import Factor

REMEDY = (
    "Call ds_moelora.tag_lora_pairs(model) before the optimizer is built, and give the optimizer both lora_A and "
    "lora_B (model.parameters() that require gradients)."
)


@dataclass(frozen=True)
class TaggedFactor:
    """A parameter that is the A or B of a pair, with the number of its group and the index of its partner."""

    param: nn.Parameter
    pair: LoraPair
    role: str
    group: int
    partner: int

    def placed(self, placement: Placement) -> Factor:
        return Factor(
            name=f"{self.pair.name}.lora_{self.role}",
            num_experts=self.pair.num_experts,
            rank=self.pair.rank,
            rank_first=self.pair.rank_first_A and self.role == "A",
            partner=self.partner,
            placement=placement,
        )


def collect_pairs(members: Mapping[int, Sequence[nn.Parameter]]) -> list[TaggedFactor]:
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
                if hasattr(param, "device_mesh"):
                    raise ValueError(
                        f"{tag[0].name}: lora_{tag[1]} is a DTensor (FSDP or tensor parallelism), on whose shards this "
                        "optimizer would not be exact; shard with DeepSpeed ZeRO instead."
                    )
                found.setdefault(tag[0], {})[tag[1]] = (param, index)
    if not found:
        raise ValueError(f"none of the optimizer's parameters belongs to a LoRA pair. {REMEDY}")
    factors: list[TaggedFactor] = []
    for pair, halves in found.items():
        if len(halves) < 2:
            (role,) = halves
            missing = "B" if role == "A" else "A"
            raise ValueError(
                f"{pair.name}: the optimizer has lora_{role} but not lora_{missing}; a Riemannian step needs both. "
                f"{REMEDY}"
            )
        trained = {role: param.requires_grad for role, (param, _) in halves.items()}
        if trained["A"] != trained["B"]:
            frozen = "B" if trained["A"] else "A"
            raise ValueError(
                f"{pair.name}: lora_{frozen} is frozen while its partner is trained; freeze both or neither."
            )
        if not trained["A"]:
            continue
        for k, role in enumerate("AB"):
            param, group_index = halves[role]
            factors.append(TaggedFactor(param, pair, role, group_index, partner=len(factors) + 1 - 2 * k))
    return factors
