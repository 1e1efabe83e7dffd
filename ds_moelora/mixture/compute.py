"""What the ways to compute a mixture's products share: their interface, and the gate scaling of the gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs import GATE_SCALINGS
from .routing import gates_backward


def gate_factor(gate_scaling: str, gates: Tensor, chosen: Tensor) -> Tensor:
    """The factor h on an expert's gradient: g ("none"), sqrt(g) ("sqrt") or 1 where chosen ("full").

    Args:
        gate_scaling: one of `GATE_SCALINGS`.
        gates: (T, E). chosen: (T, E) bool.

    Returns:
        (T, E) in the dtype of `gates`.
    """
    if gate_scaling == "none":
        return gates
    if gate_scaling == "sqrt":
        return gates.sqrt()
    if gate_scaling == "full":
        return chosen.to(gates.dtype)
    raise ValueError(f"gate_scaling={gate_scaling!r} is unknown; use one of {', '.join(GATE_SCALINGS)}.")


_NOTHING = contextlib.nullcontext()


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off inside: its rules are for torch's own functions."""
    # The dtypes are chosen here, once; autocast would cast the float32 parts of the gates again.
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that records a graph.

    torch's once_differentiable would let a gradient without a graph pass if dy is a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "MoE-LoRA has no second derivative (gate-scaled gradients are not the gradient of any function); call "
            "backward without create_graph=True."
        )


class Needs(NamedTuple):
    """Which gradients a backward pass has to compute."""

    x: bool
    gates: bool
    A: bool
    B: bool


class MixtureGrads(NamedTuple):
    """Gradients of one mixture: dx (T, I), dA like lora_A and dB like lora_B (shape and dtype, contiguous),
    dgates (T, E), and with a `RouterStep` drouter (E, I) in the compute dtype.

    None where not needed. dgates is right where an expert was chosen; elsewhere it is never read, since those gates
    are constants.
    """

    dx: Tensor | None
    dgates: Tensor | None
    dA: Tensor | None
    dB: Tensor | None
    drouter: Tensor | None = None


class RouterStep(NamedTuple):
    """The router, where a backward pass is to do its part, too.

    Args:
        weight: (E, I). dlogits: (T, E), what auxiliary losses send into the logits W x / temperature.
        temperature: as in `mixture.routed.routed_moe_lora`.
    """

    weight: Tensor
    dlogits: Tensor
    temperature: float

    def backward(self, gates: Tensor, dgates: Tensor) -> Tensor:
        """(T, E): the gradient of W x, from that of the gates."""
        return products_gradient(self.dlogits, gates, dgates, self.temperature)


def products_gradient(dlogits: Tensor, gates: Tensor, dgates: Tensor, temperature: float) -> Tensor:
    """(T, E): the gradient of W x; `mixture.routing.gates_backward` for the gates' share."""
    return (dlogits + gates_backward(gates, dgates)) / temperature


class ExpertCompute(NamedTuple):
    """One way to do the mixture's products, without autograd; callers save for backward what `forward` was given.

    Args:
        name: "dense", "grouped" or "compiled".
        forward: (base_out, x, gates, chosen, lora_A, lora_B, scaling, inplace) -> (y, p). x has the dtype of base_out;
            p is whatever `backward` wants back, one tensor.
        backward: (dy, x, p, gates, chosen, lora_A, lora_B, scaling, settings, needs, onto=None, router=None) ->
            `MixtureGrads`. x may be None unless `needs.A`. dx is added in place onto `onto`, if there is one. With
            `router`, a `RouterStep`, `needs.gates` is set; dx then has the router's share, and `needs.A` covers its
            weight.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., MixtureGrads]
