"""Which way to compute a mixture's products is taken."""

from __future__ import annotations

import functools
import warnings

import torch

from . import fused, grouped_mm
from .dense import DENSE
from .fused import FUSED
from .grouped import GROUPED
from .grouped_mm import GROUPED_MM
from .operands import Products

BY_NAME = {products.name: products for products in (DENSE, GROUPED, FUSED)}
COMPUTES = ("auto", *BY_NAME)

# Dense costs E*r columns whether chosen or not; grouped gathers and scatters k rows per token, a cost that hardly
# depends on r. They cross where E*r is so many times k (benchmarks/README.md): where the processor multiplies
# half-precision matrices far faster than it copies rows, much later.
GROUPED_FROM_COLUMNS = 256
GROUPED_FROM_COLUMNS_PER_CHOICE = 128
GROUPED_FROM_COLUMNS_PER_CHOICE_IN_HALF = 1024
# On a GPU, reckoned and not measured (docs/architecture.md): where the products over all experts take longer than the
# rows' way through memory, and longer than the launches that sorting adds.
GROUPED_MM_FROM_COLUMNS_PER_CHOICE = 512
GROUPED_MM_FROM_WORK = 1 << 22  # tokens * E * r


def choose_products(
    wish: str,
    num_experts: int,
    top_k: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    num_tokens: int = 0,
    top_p: float | None = None,
    num_A: int | None = None,
) -> Products:
    """The wish, or for "auto": on CPUs grouped if E*r >= max(256, 128 k), in 16 bits 1024 k, else dense.

    On CUDA devices "auto" is grouped if E*r >= 512 k and T*E*r >= 2^22 and `GROUPED_MM` covers the mixture, else fused.
    What `FUSED` does not cover is dense, and where it was wished for a warning says so once.

    Args:
        wish: a name in BY_NAME, or "auto". num_experts: of those that one product would cover.
        dtype: of the products. device: its type.
        num_tokens: T, if each of them is known to have top_k of these experts; 0: it is not. top_p: of the routing.
        num_A: 1: a shared A.
    """
    columns = num_experts * rank
    on_device = device == "cuda" and num_tokens > 0
    on_device = on_device and grouped_mm.why_not(rank, dtype, top_p, num_A or num_experts) is None
    if wish == "auto":
        if device == "cuda":
            enough = columns >= GROUPED_MM_FROM_COLUMNS_PER_CHOICE * top_k
            if on_device and enough and num_tokens * columns >= GROUPED_MM_FROM_WORK:
                return GROUPED_MM
            return DENSE if fused.why_not(num_experts, rank, dtype, device) else FUSED
        per_choice = GROUPED_FROM_COLUMNS_PER_CHOICE
        if dtype.itemsize == 2:
            per_choice = GROUPED_FROM_COLUMNS_PER_CHOICE_IN_HALF
        enough = device == "cpu" and columns >= max(GROUPED_FROM_COLUMNS, per_choice * top_k)
        return GROUPED if enough else DENSE
    if wish == "grouped" and on_device:
        return GROUPED_MM
    if wish == "fused" and (reason := fused.why_not(num_experts, rank, dtype, device)) is not None:
        _say_once(f"expert_compute='fused' becomes 'dense': {reason}.")
        return DENSE
    return BY_NAME[wish]


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
