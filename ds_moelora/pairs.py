"""Tags that tell an optimizer which parameters form a low-rank pair.

A Riemannian preconditioner of `s * B A` needs to know, for every parameter it is given, whether it is the A, the B
or the router of a mixture, and who its partner is. That knowledge travels on the `nn.Parameter` itself (DeepSpeed's own
habit: `allreduce`, `group_name`): it survives whatever grouping, ordering and wrapping stands between the model and the
optimizer. Both parameters of a pair carry the *same* `LoraPair` object, which is how the optimizer pairs them up; the
object holds no reference to the parameters, so that tagged models can still be pickled.

`copy.deepcopy(model)` and a move from the meta device make new Parameters without tags;
`ds_moelora.tag_lora_pairs(model)` puts them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

GATE_SCALINGS = ("none", "sqrt", "full")
Role = Literal["A", "B", "router"]


@dataclass(eq=False)
class GateSettings:
    """How a mixture's backward pass scales the gradient of its experts (shared by a layer and its optimizer).

    Args:
        gate_scaling: factor h on the gradient that reaches an expert's A and B, given the gate g:
            "none": g (exact gradient), "sqrt": sqrt(g), "full": 1 where the expert is chosen.
        scale_input_grad: True puts the same factor on the gradient into the layer's input (the published detach
            trick); False keeps that gradient exact.
    """

    gate_scaling: str = "none"
    scale_input_grad: bool = False


@dataclass(eq=False)
class LoraPair:
    """One pair (A, B) of stacked low-rank factors; the same object hangs on both parameters.

    Args:
        name: the layer's name, for messages.
        num_experts: E; 1 for plain LoRA.
        rank: r of one expert.
        scaling: s in `s * B A`.
        rank_first_A: False: A is (E, in, r), as MoE-LoRA stores it. True: A is (r, in), as PEFT stores it (E = 1).
            B is always (E, out, r), or (out, r).
        gate: the layer's gate settings; None where there is no gate (plain LoRA).
    """

    name: str
    num_experts: int
    rank: int
    scaling: float = 1.0
    rank_first_A: bool = False
    gate: GateSettings | None = field(default=None)


def tag_parameter(param: nn.Parameter, pair: LoraPair, role: Role) -> None:
    """Marks `param` as the `role` of `pair`. Tagging again replaces the earlier tag."""
    param.lora_pair = pair  # type: ignore[attr-defined]
    param.lora_role = role  # type: ignore[attr-defined]


def tag_pair(
    pair: LoraPair, lora_A: nn.Parameter, lora_B: nn.Parameter, router: nn.Parameter | None = None
) -> LoraPair:
    """Marks the two factors of a pair, and the router's weight if there is one.

    Raises:
        ValueError: the shapes do not fit `pair`.
    """
    rank_of_A = lora_A.shape[0] if pair.rank_first_A else lora_A.shape[-1]
    rank_of_B = lora_B.shape[1] if pair.rank_first_A else lora_B.shape[-1]
    if lora_A.numel() and lora_B.numel() and (rank_of_A != pair.rank or rank_of_B != pair.rank):
        raise ValueError(
            f"{pair.name}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not both have rank "
            f"{pair.rank}; pass the rank that the two factors share."
        )
    tag_parameter(lora_A, pair, "A")
    tag_parameter(lora_B, pair, "B")
    if router is not None:
        tag_parameter(router, pair, "router")
    return pair


def tag_of(param: nn.Parameter) -> tuple[LoraPair, Role] | None:
    """The pair that a parameter belongs to, and its role there; None for any other parameter."""
    if not hasattr(param, "lora_pair"):
        return None
    return param.lora_pair, param.lora_role  # type: ignore[attr-defined]
