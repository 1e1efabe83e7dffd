"""What a model's routers and experts did in one training step, summed on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tuner import MoELoRAExperts, MoELoRAModel
from .formulas import projection, router_sums, sketch_products


class RouterMeter:
    """A `RouterListener` of every MoE-LoRA adapter in a model; sums over the forward passes since `arm`.

    Layers are the trained `MoELoRAExperts` in the model's order, which is the same on every rank.

    Args:
        model: with or without MoE-LoRA layers.

    Attributes:
        names: of the layers. num_experts: E of each. ep_size: ranks that share the experts.
        packed: (L, 4 + E): entropy, balance, tokens, sequences and slots of `RouterSums`, E padded to the largest.
        sketches: (L, E, P * P), `monitoring.formulas.sketch_products`; zero where the experts are other ranks'.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tuners = [m for m in model.modules() if isinstance(m, MoELoRAModel)]
        experts = [m for m in model.modules() if isinstance(m, MoELoRAExperts) and m.router.weight.requires_grad]
        self.experts = experts
        self.names = [e.pair.name for e in experts]
        self.num_experts = [e.num_experts for e in experts]
        self.ep_size = max((e.num_experts // len(e.factors()[1]) for e in experts if e.is_sharded), default=1)
        self._projections: dict[tuple[int, torch.device], Tensor] = {}
        self._position: dict[Any, int] = {}

    def arm(self, device: torch.device) -> None:
        """From zero; the next training forwards are looked at."""
        L, E = len(self.experts), max(self.num_experts, default=0)
        self.packed = torch.zeros(L, 4 + E, device=device)
        self.sketches = torch.zeros(L, E, projection(1).shape[1] ** 2, device=device)
        self._sketched: set[int] = set()
        self._position = {id(e): i for i, e in enumerate(self.experts)}
        for tuner in self.tuners:
            tuner.router_listener = self

    def disarm(self) -> None:
        """Nothing is looked at any more."""
        for tuner in self.tuners:
            tuner.router_listener = None

    def saw_experts(self, experts: Any) -> None:
        layer = self._position.get(id(experts))
        if layer is None or layer in self._sketched:
            return
        self._sketched.add(layer)
        lora_A, lora_B = experts.factors()
        first = experts.experts_shard().first_expert if experts.is_sharded else 0
        sketches = sketch_products(lora_A, lora_B, *(self._projection(f) for f in (lora_A, lora_B)))
        self.sketches[layer, first : first + len(sketches)] = sketches

    def saw_router(self, experts: Any, logits: Tensor, chosen: Tensor, mask: Tensor | None) -> None:
        layer = self._position.get(id(experts))
        if layer is None:
            return
        sums = router_sums(logits[None], chosen[None], mask)
        columns = torch.cat([torch.stack(sums[1:], 1), sums.slots], 1)[0]
        self.packed[layer, : len(columns)] += columns

    def _projection(self, factor: Tensor) -> Tensor:
        key = (factor.shape[1], factor.device)
        if key not in self._projections:
            self._projections[key] = projection(*key)
        return self._projections[key]
