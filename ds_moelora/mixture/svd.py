"""Chosen singular triplets of a weight: W ~ sum_k S_k u_k v_k^T over some k, counted from the largest singular value.

Three algorithms, `benchmarks/bench_svd.py` measures them:

    full     torch.linalg.svd of W. The yardstick.
    gram     eigenvectors of the float64 Gram matrix of the smaller side (W^T W or W W^T), all of them.
    krylov   for one end of the spectrum: block Krylov subspaces of that Gram matrix, or of its shifted inverse by
             Cholesky factorisation, with Rayleigh-Ritz steps and restarts until the residual is small.

From eigenvectors v the rest follows without a square root of an eigenvalue: S = |W v|, u = W v / S, which keeps small
singular values accurate. A Gram matrix squares the condition number, but in float64 of weights that were rounded to
float32 at best: what is lost lies below the weights' own rounding.

A singular vector's sign is arbitrary, and libraries choose it differently: here the entry of largest magnitude of every
left vector is positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ALGORITHMS = ("auto", "full", "gram", "krylov")
# A Krylov space has DEPTH + 1 blocks. Beyond these shares of the whole space the full eigendecomposition is taken,
# because it is faster ("auto"), or because rounding would spoil the space ("krylov").
DEPTH, WORTHWHILE, LARGEST_SPACE = 6, 0.25, 0.5
# Restarts, and after how many of them the operator is chosen anew.
MAX_RESTARTS, SHIFTS = 8, 2
OVERSAMPLING = 8
# |G v - lambda v| / |G|, or the same of the inverse. Eigenvalues are then accurate to its square over the gap.
RESIDUAL = 1e-10


class Triplets(NamedTuple):
    """K singular triplets: U (out, K), S (K,), V (in, K), in float64."""

    U: Tensor
    S: Tensor
    V: Tensor


@torch.no_grad()
def singular_triplets(weight: Tensor, indices: Tensor, algorithm: str = "auto") -> Triplets:
    """The singular triplets of `weight` with the given numbers, with fixed signs.

    Args:
        weight: (out, in), any floating dtype.
        indices: (K,) int64, each in [0, min(out, in)), 0 being the largest singular value; in any order.
        algorithm: "full", "gram", "krylov", or "auto": krylov where the indices are one end of the spectrum and few,
            else gram.

    Returns:
        `Triplets` in the order of `indices`.

    Raises:
        ValueError: an unknown algorithm; krylov for indices that are not one end of the spectrum; a weight that is not
            finite.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is unknown; use one of {', '.join(ALGORITHMS)}.")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has entries that are not finite (NaN or infinite), so it has no SVD.")
    W, n = weight.double(), min(weight.shape)
    indices = indices.to(W.device)
    end = _which_end(indices, n)
    if algorithm == "auto":
        algorithm = "krylov" if end is not None and _fits(len(indices), n, WORTHWHILE) else "gram"
    if algorithm == "full":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return _fix_signs(Triplets(U[:, indices], S[indices], Vh[indices].T))
    tall = W if W.shape[0] >= W.shape[1] else W.T
    G = tall.T @ tall
    if algorithm == "gram":
        vectors = torch.linalg.eigh(G).eigenvectors.flip(1)[:, indices]
    elif end is None:
        raise ValueError("algorithm='krylov' finds one end of the spectrum; use 'gram' for triplets in between.")
    else:
        ordered = _extreme_eigenvectors(G, len(indices), largest=end == "top")
        vectors = ordered[:, indices - (0 if end == "top" else n - len(indices))]
    found = _complete(tall, vectors)
    return _fix_signs(found if tall is W else Triplets(found.V, found.S, found.U))


def _which_end(indices: Tensor, n: int) -> str | None:
    """ "top" or "bottom" if the indices are the K largest or the K smallest, in any order."""
    ordered, K = indices.sort().values.cpu(), len(indices)
    for name, first in (("top", 0), ("bottom", n - K)):
        if torch.equal(ordered, torch.arange(first, first + K)):
            return name
    return None


def _fits(K: int, n: int, share: float) -> bool:
    """Whether the Krylov space for K vectors is at most this share of the whole space."""
    return share * n >= (DEPTH + 1) * (K + OVERSAMPLING)


def _complete(tall: Tensor, vectors: Tensor) -> Triplets:
    """(rows, n) and right vectors (n, K) -> triplets; where W v = 0, the left vector is 0 as well."""
    product = tall @ vectors
    S = torch.linalg.vector_norm(product, dim=0)
    return Triplets(product / S.clamp_min(torch.finfo(S.dtype).tiny), S, vectors)


def _fix_signs(triplets: Triplets) -> Triplets:
    U, S, V = triplets
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return Triplets(U * sign, S, V * sign)


def _extreme_eigenvectors(G: Tensor, K: int, largest: bool) -> Tensor:
    """(n, K) eigenvectors of the K largest or smallest eigenvalues of G (n, n), those of larger ones first.

    The first Krylov space is that of G (largest) or of G^-1 (smallest); if that was not enough, those of (m I - S)^-1,
    S = G or -G, with m just above the largest eigenvalue of S, which the first space has told: it pulls apart what is
    crowded at the edge.
    """
    n, S = len(G), G if largest else -G
    block = min(K + OVERSAMPLING, n)
    # The shift keeps a singular G positive definite, and moves no eigenvector.
    factor = None if largest else _factor(S, 8 * torch.finfo(G.dtype).eps * G.diagonal().sum())
    # A fixed stream, drawn on the CPU: equal on every rank and device, and nobody else's random numbers change.
    # torch.rand, since deepspeed.zero.Init changes the dtype that torch.randn and its like return.
    drawn = torch.rand(n, block, dtype=G.dtype, generator=torch.Generator().manual_seed(0)) - 0.5
    X, residual = torch.linalg.qr(drawn.to(G)).Q, math.inf
    for restart in range(MAX_RESTARTS if _fits(K, n, LARGEST_SPACE) else 0):
        X, values, images = _ritz_vectors(S, factor, X)
        before, residual = residual, _residual(X[:, :K], images[:, :K], values[:K])
        if residual <= RESIDUAL:
            return X[:, :K] if largest else X[:, :K].flip(1)
        X = torch.linalg.qr(X).Q
        if restart < SHIFTS:
            factor = _factor_at_the_edge(S, X[:, :K]) or factor
        elif residual * min(residual / before, 1.0) ** (MAX_RESTARTS - 1 - restart) > RESIDUAL:
            break  # at the rate of this restart, the rest would not be enough
    eigenvectors = torch.linalg.eigh(G).eigenvectors
    return eigenvectors[:, -K:].flip(1) if largest else eigenvectors[:, :K].flip(1)


def _factor(S: Tensor, m: Tensor | float) -> tuple[Tensor, ...] | None:
    """The Cholesky factor of m I - S, as the only element; None if that is not positive definite."""
    shifted = -S
    shifted.diagonal().add_(m)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if failed else (factor,)


def _factor_at_the_edge(S: Tensor, X: Tensor) -> tuple[Tensor, ...] | None:
    """`_factor` with m above the largest eigenvalue of S, as far as the leading ones, of X (n, K), lie apart."""
    quotients = (X * (S @ X)).sum(0)
    edge = quotients.max()
    distance = (edge - quotients.min()) / X.shape[1]
    for _ in range(4):
        factor = _factor(S, edge + distance)
        if factor is not None:
            return factor
        distance = 4 * distance
    return None


def _ritz_vectors(S: Tensor, factor: tuple[Tensor, ...] | None, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leading Ritz vectors Y (as many as X has), values and H Y, in the Krylov space of X.

    H is S, or the inverse that `factor` belongs to.
    """

    def apply(vectors: Tensor) -> Tensor:
        return S @ vectors if factor is None else torch.cholesky_solve(vectors, factor[0])

    Q, images = _krylov_space(apply, X)
    H = Q.T @ images
    values, mixing = torch.linalg.eigh((H + H.T) / 2)
    mixing = mixing.flip(1)[:, : X.shape[1]]
    return Q @ mixing, values.flip(0)[: X.shape[1]], images @ mixing


def _residual(X: Tensor, images: Tensor, values: Tensor) -> float:
    """max |H x - lambda x| / |H| over Ritz vectors."""
    return (torch.linalg.vector_norm(images - X * values, dim=0).max() / values[0]).item()


def _krylov_space(apply: Callable[[Tensor], Tensor], X: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q of span(X, H X, ..., H^DEPTH X), and H Q, for `apply`: X -> H X."""
    basis, images = X, apply(X)
    last = images
    for _ in range(DEPTH):
        for _ in range(2):  # once is not enough: what is left of a nearly dependent block is mostly rounding
            last = last - basis @ (basis.T @ last)
            last = torch.linalg.qr(last).Q
        basis = torch.cat([basis, last], 1)
        last = apply(last)
        images = torch.cat([images, last], 1)
    return basis, images
