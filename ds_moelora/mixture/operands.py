"""What a mixture of low-rank experts is computed from, and what its products and their gradients are.

    y_t = base_t + s * sum_i g_ti B_i A_i x_t

Shape suffixes in all of `mixture` and `expert_parallel`: T tokens, I input features, O output features, E experts, R
rank of one expert. Experts are stored as `lora_A` (E, I, R) and `lora_B` (E, O, R). A `lora_A` of shape (1, I, R) is
shared: one A whose projection each expert scales by its own gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs import GATE_SCALINGS, GateSettings
from .routing import chosen_by, gates_backward, route


class RoutingRule(NamedTuple):
    """How logits become gates: `mixture.routing.route(W x / temperature, top_k, top_p)`."""

    top_k: int
    top_p: float | None = None
    temperature: float = 1.0


class Operands(NamedTuple):
    """One mixture: its tokens, its experts, and either the tokens' gates or the router that gives them.

    Args:
        x: (T, I), the experts' input.
        lora_A: (E, I, R), or (1, I, R): shared. lora_B: (E, O, R). Any floating dtype; their gradients come back in it.
        scaling: s.
        gates: (T, E), float32 or wider, -0.0 where an expert is not chosen (as `route` gives them).
        router: (E, I), the router's weight, any floating dtype. rule: what makes gates of its logits.
        settings: how the gradients of A and B (and of x, on request) are scaled. Read when the backward pass runs,
            since the optimizer that sets it is built after the model. The default is the exact gradient.
        pairs: what `mixture.grouped_mm` keeps of its order.
    """

    x: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    gates: Tensor | None = None
    router: Tensor | None = None
    rule: RoutingRule | None = None
    settings: GateSettings = GateSettings()
    pairs: tuple[Tensor, ...] | None = None

    def token_gates(self) -> Tensor:
        """The gates, which are known once the router has run."""
        assert self.gates is not None
        return self.gates

    def gradient_factor(self) -> Tensor:
        """(T, E), h of `gate_factor`."""
        return gate_factor(self.settings.gate_scaling, self.token_gates())

    def scales_alike(self) -> bool:
        """Whether the gradients of A and of x have the same factor."""
        return self.settings.gate_scaling == "none" or self.settings.scale_input_grad

    def logits_gradient(self, dgates: Tensor, dlogits: Tensor | None) -> Tensor:
        """(T, E): the gradient of the router's product W x, from those of the gates and of the logits."""
        assert self.rule is not None
        total = gates_backward(self.token_gates(), dgates)
        total = total if dlogits is None else total + dlogits
        return total if self.rule.temperature == 1 else total / self.rule.temperature


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute. With a router, `A` covers its weight.

    Args:
        onto: dx is added onto it in place. dlogits: (T, E), what auxiliary losses send into the logits, if anything.
    """

    x: bool
    gates: bool
    A: bool
    B: bool
    onto: Tensor | None = None
    dlogits: Tensor | None = None


class Grads(NamedTuple):
    """Gradients of one mixture: dx (T, I), dgates (T, E), dA like lora_A and dB like lora_B (shape and dtype,
    contiguous), and with a router drouter (E, I) in the compute dtype.

    None where not needed. dgates is right where an expert was chosen; elsewhere it is never read, since those gates
    are constants.
    """

    x: Tensor | None
    gates: Tensor | None
    A: Tensor | None
    B: Tensor | None
    router: Tensor | None = None


class Products:
    """One way to compute a mixture's products, without autograd: `dense`, `grouped`, `fused`, or one over processes.

    With `routes` it takes a router, too: the operands come without gates, p's last E columns are the logits, the
    operands that `forward` returns have the gates, and `backward` does without them. `route` is `mixture.routing.route`
    or does the same.
    """

    name: str
    routes = False
    route: Callable[..., Tensor] = staticmethod(route)

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        """y (T, O); the operands to be saved; and p, one tensor: `backward` gets both back.

        Args:
            operands: with gates (`routes`: or a router), and x in the dtype of base_out.
            inplace: y may overwrite base_out.
        """
        raise NotImplementedError

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        """The gradients; with a router among the operands, dx has its share.

        Args:
            operands: as saved; x is read for dA (and drouter) alone.
        """
        raise NotImplementedError


def through_router(
    o: Operands, dgates: Tensor | None, dx: Tensor | None, needs: Needs, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """dx, onto which the router's share is added, and drouter; nothing without a router."""
    if dgates is None or o.router is None:
        return dx, None
    dlogits = o.logits_gradient(dgates, needs.dlogits).to(dtype)
    dx = None if dx is None else dx.addmm_(dlogits, o.router.to(dtype))
    return dx, dlogits.t() @ o.x if needs.A else None


def gate_factor(gate_scaling: str, gates: Tensor) -> Tensor:
    """The factor h on an expert's gradient: g ("none"), sqrt(g) ("sqrt") or 1 where chosen ("full").

    Args:
        gate_scaling: one of `GATE_SCALINGS`.
        gates: (T, E), as in `Operands`.

    Returns:
        (T, E) in the dtype of `gates`.
    """
    check_gate_scaling(gate_scaling)
    if gate_scaling == "none":
        return gates
    return gates.sqrt() if gate_scaling == "sqrt" else chosen_by(gates).to(gates.dtype)


def check_gate_scaling(gate_scaling: str) -> None:
    """Raises ValueError if nothing has this name."""
    if gate_scaling not in GATE_SCALINGS:
        raise ValueError(f"gate_scaling={gate_scaling!r} is unknown; use one of {', '.join(GATE_SCALINGS)}.")


_NOTHING = contextlib.nullcontext()


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off inside: its rules are for torch's own functions."""
    # The dtypes are chosen here, once; autocast would cast the float32 parts of the gates again.
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING
