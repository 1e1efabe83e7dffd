"""The router of one layer: token -> one logit per expert."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixture.initial_values import draw_uniform_


class Router(nn.Linear):
    """(..., I) -> (..., E) logits `W x / temperature`, computed in the input's dtype.

    Casting the (E, I) weight rather than the input keeps a float32 adapter on a bfloat16 model from making a float32
    copy of every activation. A module of its own, because ZeRO-3 fetches a parameter when its module is called.

    Args:
        in_features: I. num_experts: E.
        names: of the layer and the adapter; they seed the starting values, uniform in +-1/sqrt(I) as nn.Linear's.
        temperature: > 0; large ones even the gates out, small ones sharpen them (Hinton et al., arXiv 1503.02531,
            section 2). The auxiliary losses see the divided logits too.
        jitter: eps; in training mode the router (not the experts) sees x times a number drawn uniformly from
            [1 - eps, 1 + eps] for each element (Fedus et al., "Switch Transformers", appendix C). The draw comes
            from torch's generator of the device, which gradient checkpointing restores before it recomputes.
    """

    weight: nn.Parameter

    def __init__(
        self, in_features: int, num_experts: int, names: tuple[str, str], temperature: float, jitter: float
    ) -> None:
        super().__init__(in_features, num_experts, bias=False)
        self.temperature, self.jitter = temperature, jitter
        # Here and not later: inside deepspeed.zero.Init, parameters are cut up as soon as __init__ returns.
        draw_uniform_(self.weight, 1 / math.sqrt(in_features), *names, "router")

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x, self.weight.to(x.dtype))
        return logits if self.temperature == 1 else logits / self.temperature


def has_no_hooks(module: nn.Module) -> bool:
    """Whether a call of this module is its class's `forward` and nothing else, so that it may be done elsewhere."""
    return "forward" not in module.__dict__ and not (  # e.g. replaced by accelerate
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def as_in_forward(owner: nn.Module, name: str, found: bool) -> bool:
    """`found`; in a recomputation (gradient checkpointing), what was found in the forward pass before it.

    Hooks come and go between the two (DeepSpeed's flops profiler), and another path would save other tensors.

    Args:
        owner: remembers the answer under `name`.
    """
    if torch.compiler.is_compiling():  # a graph has forward and recomputation from one trace
        return found
    if torch._C._current_graph_task_id() != -1:  # inside a backward pass
        return getattr(owner, name, found)
    owner.__dict__[name] = found  # nn.Module's own setattr takes microseconds
    return found
