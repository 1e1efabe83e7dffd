"""Tags that tell an optimizer which parameters form a low-rank pair, and the gate settings that both sides share.

A Riemannian preconditioner of `s * B A` has to know of every parameter whether it is the A, the B or the router of a
mixture, and which parameter is its partner. That knowledge travels on the `nn.Parameter` itself (DeepSpeed's own habit:
`allreduce`, `group_name`), so it survives whatever grouping, ordering and wrapping stands between model and optimizer.
Both parameters of a pair carry the *same* `LoraPair`. It holds no reference to them: tagged models can be pickled.

`copy.deepcopy(model)` and a move from the meta device make new Parameters without tags;
`ds_moelora.tag_lora_pairs(model)` puts them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

GATE_SCALINGS = ("none", "sqrt", "full")
Role = Literal["A", "B", "router"]


class GateConflictError(ValueError):
    """Two living optimizers ask one layer for different gate settings."""


@dataclass(eq=False)
class GateSettings:
    """How a mixture's backward pass scales the gradient of its experts.

    The layer owns them. An optimizer may hold them at other values: from `hold` until it calls `release`, which the
    package's optimizers do when they are garbage-collected. Then the layer's own values are back. A copy of a layer, or
    an unpickled one, has its own values: no optimizer holds it.

    Args:
        gate_scaling: factor h on the gradient that reaches an expert's A and B, given the gate g:
            "none": g (exact gradient), "sqrt": sqrt(g), "full": 1 where the expert is chosen.
        scale_input_grad: True puts the same factor on the gradient into the layer's input (the published detach
            trick); False keeps that gradient exact.
    """

    gate_scaling: str = "none"
    scale_input_grad: bool = False

    def __post_init__(self) -> None:
        self._holders: dict[int, str] = {}  # key of each holder, and its name
        self._own = (self.gate_scaling, self.scale_input_grad)

    def hold(self, key: int, holder: str, layer: str, gate_scaling: str, scale_input_grad: bool) -> None:
        """Sets both values until `release(key)`; a holder that is there already may change its mind.

        Args:
            holder, layer: their names, for messages.

        Raises:
            GateConflictError: another holder wants other values.
        """
        held, wanted = (self.gate_scaling, self.scale_input_grad), (gate_scaling, scale_input_grad)
        others = [name for other, name in self._holders.items() if other != key]
        if others and held != wanted:
            raise GateConflictError(
                f"{layer}: {holder} asks for gate_scaling={gate_scaling!r} and scale_input_grad={scale_input_grad}, "
                f"but another living optimizer ({others[0]}) holds the layer at {held[0]!r} and {held[1]}. Delete that "
                "optimizer (and the engine or trainer that keeps it) first, or give both the same settings."
            )
        if not self._holders:
            self._own = held
        self._holders[key] = holder
        self.gate_scaling, self.scale_input_grad = wanted

    def release(self, key: int) -> None:
        """Ends a hold. With the last one the layer has its own values again."""
        if self._holders.pop(key, None) is not None and not self._holders:
            self.gate_scaling, self.scale_input_grad = self._own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._own if self._holders else (self.gate_scaling, self.scale_input_grad)


@dataclass(eq=False)
class LoraPair:
    """One pair (A, B) of stacked low-rank factors; the same object hangs on both parameters.

    Args:
        name: the layer's name, for messages.
        num_experts: E; 1 for plain LoRA.
        rank: r of one expert.
        scaling: s in `s * B A`.
        rank_first_A: False: A is (E, in, r) and B (E, out, r), as MoE-LoRA stores them. True: as PEFT stores them, A is
            (E r, in), which is (E, r, in), and B (out, E r), which is (out, r, E).
        gate: the layer's gate settings; None where there is no gate (plain LoRA).
        awaits: name of an optimizer that was built for the pair and has not run yet; "" otherwise.
    """

    name: str
    num_experts: int
    rank: int
    scaling: float = 1.0
    rank_first_A: bool = False
    gate: GateSettings | None = None
    awaits: str = field(default="", init=False, repr=False)


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
    rank = pair.rank * pair.num_experts if pair.rank_first_A else pair.rank
    if lora_A.numel() and lora_B.numel() and (rank_of_A != rank or rank_of_B != rank):
        raise ValueError(
            f"{pair.name}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not both have rank "
            f"{rank}; pass the rank that the two factors share."
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
