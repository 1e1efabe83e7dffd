"""Chosen singular triplets of a weight: W ~ sum_k S_k u_k v_k^T over some k, counted from the largest singular value.

The eigenvectors v of the Gram matrix of the smaller side (W^T W, or W W^T with u and v exchanged) are the right
singular vectors; the rest follows without a square root of an eigenvalue: S = |W v|, u = W v / S, which keeps small
singular values accurate. All of it is float64: a Gram matrix squares the condition number, and what that loses in
float64 lies below the rounding of a weight that was stored in float32 at best. The Gram matrix takes 0.3 to 0.8 of the
time of `torch.linalg.svd` in float32 (`benchmarks/bench_svd.py`), whichever triplets are wanted.

The work is done on the GPU if there is one, wherever the weight lies: one weight at a time goes there, and the triplets
come back.

A singular vector's sign is arbitrary, and libraries choose it differently: here the entry of largest magnitude of every
left vector is positive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Triplets(NamedTuple):
    """K singular triplets: U (out, K), S (K,), V (in, K), in float64."""

    U: Tensor
    S: Tensor
    V: Tensor


@torch.no_grad()
def singular_triplets(weight: Tensor, indices: Tensor) -> Triplets:
    """The singular triplets of `weight` with the given numbers, with fixed signs.

    Args:
        weight: (out, in), any floating dtype.
        indices: (K,) int64, each in [0, min(out, in)), 0 being the largest singular value; in any order.

    Returns:
        `Triplets` in the order of `indices`, on the device of `weight`.

    Raises:
        ValueError: the weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite (NaN or infinite), so it has no SVD.")
    W = weight.to(work_device(weight.device), torch.float64)
    tall = W if W.shape[0] >= W.shape[1] else W.T
    vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)[:, indices.to(W.device)]
    product = tall @ vectors
    S = torch.linalg.vector_norm(product, dim=0)
    left = product / S.clamp_min(torch.finfo(S.dtype).tiny)  # 0 where W v = 0
    U, V = (left, vectors) if tall is W else (vectors, left)
    sign = torch.where(U.gather(0, U.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return Triplets(*(found.to(weight.device) for found in (U * sign, S, V * sign)))


def work_device(stored: torch.device) -> torch.device:
    """Where a weight stored on a device is decomposed: this process's GPU, if it has one (other kinds lack float64)."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else stored
