"""Which way to compute a mixture's products is taken."""

from __future__ import annotations

import torch

from .dense import DENSE
from .fused import FUSED
from .grouped import GROUPED
from .operands import Products

BY_NAME = {products.name: products for products in (DENSE, GROUPED, FUSED)}
COMPUTES = ("auto", *BY_NAME)

# Dense costs E*r columns whether chosen or not; grouped gathers and scatters k rows per token, a cost that hardly
# depends on r. They cross where E*r is so many times k (benchmarks/README.md): where the processor multiplies
# half-precision matrices far faster than it copies rows, much later.
GROUPED_FROM_COLUMNS = 256
GROUPED_FROM_COLUMNS_PER_CHOICE = 128
GROUPED_FROM_COLUMNS_PER_CHOICE_IN_HALF = 1024


def choose_products(wish: str, num_experts: int, top_k: int, rank: int, dtype: torch.dtype = torch.float32) -> Products:
    """The wish, or for "auto": grouped on CPUs if E*r >= max(256, 128 k), in 16 bits 1024 k; else dense.

    With an accelerator "auto" is dense: grouped has to know on the host how many rows each expert gets, one
    synchronisation per pass, and where it would still win there has not been measured.

    Args:
        wish: a name in BY_NAME, or "auto". num_experts: of those that one product would cover.
        dtype: of the products.
    """
    if wish == "auto":
        per_choice = GROUPED_FROM_COLUMNS_PER_CHOICE
        if dtype.itemsize == 2:
            per_choice = GROUPED_FROM_COLUMNS_PER_CHOICE_IN_HALF
        enough = num_experts * rank >= max(GROUPED_FROM_COLUMNS, per_choice * top_k)
        return GROUPED if enough and not torch.accelerator.is_available() else DENSE
    return BY_NAME[wish]
