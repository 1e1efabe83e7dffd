"""Starting values that do not depend on the topology: every expert of every layer has a random stream of its own.

The stream's seed is a hash of torch's initial seed (`torch.manual_seed`), the layer's and the adapter's name, the
parameter and the expert's global number. Whoever holds expert i of a layer, alone or among others, draws the same
values for it, and nobody has to draw another's.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def expert_seed(layer: str, adapter: str, parameter: str, expert: int) -> int:
    """A 63-bit seed from the names and `torch.initial_seed()`; the same on every machine and Python version."""
    text = "\x1f".join((str(torch.initial_seed()), layer, adapter, parameter, str(expert)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def draw_uniform_(
    target: Tensor, bound: float, layer: str, adapter: str, parameter: str, first_expert: int = 0
) -> None:
    """Fills experts [first_expert, first_expert + len(target)) of a parameter: uniform in [-bound, bound).

    Drawn in float32 on the CPU, one expert at a time, so that neither device nor dtype changes the values (but for
    rounding to the target's dtype). Nothing happens on the meta device.

    Args:
        target: (E_local, ...).
        bound: half the width of the distribution.
        layer, adapter, parameter: names that tell the stream from others.
        first_expert: global number of target's first expert.
    """
    if target.is_meta:
        return
    for i, values in enumerate(target):
        generator = torch.Generator().manual_seed(expert_seed(layer, adapter, parameter, first_expert + i))
        # torch.rand, since deepspeed.zero.Init changes the dtype that torch.empty and its like return.
        drawn = torch.rand(values.shape, generator=generator, dtype=torch.float32, device="cpu")
        values.copy_(drawn.mul_(2 * bound).sub_(bound))
