"""Do experts specialise on skills: which experts routers choose for the tokens of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_moelora.tuner.layer import MoELoRALayer


def mutual_information(counts: Tensor) -> float:
    """I(skill; expert) in bits of a table of counts (skills, experts): 0 if they are independent."""
    joint = counts.double() / counts.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint / independent).log2()).nan_to_num(0.0).sum().item()


class ExpertCounts:
    """How often each layer's router sends tokens of each skill to each expert, while the block runs.

    Every chosen expert of a token counts once, whatever its gate. What routers see is taken from the layers' inputs.
    """

    def __init__(self, model: nn.Module, skills: int) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, MoELoRALayer)]
        self.tables = [torch.zeros(skills, layer.experts("default").num_experts) for layer in self.layers]
        self.counted = torch.empty(0, dtype=torch.bool)
        self.skills = torch.empty(0, dtype=torch.long)

    def __enter__(self) -> ExpertCounts:
        self.handles = [
            layer.register_forward_pre_hook(lambda module, args, i=i: self._count(i, args[0]))
            for i, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def expect(self, skills: Tensor, counted: Tensor) -> None:
        """Of the next batch: each line's skill (n,), and which of its tokens count (n, L)."""
        self.skills, self.counted = skills[:, None].to(counted.device).expand_as(counted)[counted].cpu(), counted

    def _count(self, number: int, x: Tensor) -> None:
        experts = self.layers[number].experts("default")
        x = x[self.counted].to(experts.router.weight.dtype)
        chosen = experts.router(x).topk(experts.top_k).indices.cpu()  # (tokens, k)
        pairs = self.skills[:, None] * experts.num_experts + chosen
        table = self.tables[number]
        table += torch.bincount(pairs.flatten(), minlength=table.numel()).view_as(table)
