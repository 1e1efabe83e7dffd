"""The expert that every token uses, beside those that the router chooses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..mixture.initial_values import draw_uniform_
from ..mixture.mixture import mix
from ..mixture.operands import Operands
from ..pairs import LoraPair, tag_pair


class SharedExpert(nn.Module):
    """y_t = base_t + s * B A x_t: a mixture of one expert whose gate is 1. `lora_A` (1, I, R), `lora_B` (1, O, R).

    With `ep_size > 1` it is whole on every rank, data parallel like the router. A module of its own, because ZeRO-3
    fetches a parameter when its module is called; its pair is one of its own to the optimizer.

    Args:
        in_features: I. out_features: O. rank: R.
        scaling: s.
        names: of the layer and the adapter; they seed the starting values.
        zero_B: B starts at zero; False: random, for tests.

    Source: Dai et al., "DeepSeekMoE" (arXiv 2401.06066), section 3.2.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, names: tuple[str, str], zero_B: bool
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.empty(1, in_features, rank))
        self.lora_B = nn.Parameter(torch.zeros(1, out_features, rank))
        # Here and not later: inside deepspeed.zero.Init, parameters are cut up as soon as __init__ returns.
        draw_uniform_(self.lora_A, 1 / math.sqrt(in_features), *names, "shared.lora_A")
        if not zero_B:
            draw_uniform_(self.lora_B, 1 / math.sqrt(rank), *names, "shared.lora_B")
        self.pair = LoraPair(name=f"{names[0]}.shared", num_experts=1, rank=rank, scaling=scaling)

    def tag(self, layer_name: str) -> None:
        """Puts the pair's tag on the parameters."""
        self.pair.name = f"{layer_name}.shared"
        tag_pair(self.pair, self.lora_A, self.lora_B)

    def forward(self, x: Tensor, base_out: Tensor, inplace: bool, base_weight: Tensor | None = None) -> Tensor:
        """(T, I), (T, O) -> (T, O); `inplace`: `base_out` may be overwritten; `base_weight`: see `mixture.mix`."""
        gates = torch.ones(len(x), 1, dtype=torch.promote_types(base_out.dtype, torch.float32), device=x.device)
        # No gate settings: a gate of 1 has the same factor under every gate scaling.
        operands = Operands(x=x, lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling, gates=gates)
        return mix(operands, base_out, inplace=inplace, base_weight=base_weight).y
