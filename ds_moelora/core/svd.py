"""Chosen singular triplets of a weight: W ~ sum_k S_k u_k v_k^T over some k, counted from the largest singular value.

Three algorithms, `benchmarks/bench_svd.py` measures them:

    full     torch.linalg.svd of W. The yardstick.
    gram     eigenvectors of the float64 Gram matrix of the smaller side (W^T W or W W^T), all of them.
    krylov   for one end of the spectrum: block Krylov subspaces of that Gram matrix (largest) or of its inverse by
             Cholesky factorisation (smallest), with Rayleigh-Ritz steps and restarts until the residual is small.

From eigenvectors v the rest follows without a square root of an eigenvalue: S = |W v|, u = W v / S, which keeps small
singular values accurate. A Gram matrix squares the condition number, but in float64 of weights that were rounded to
float32 at best: what is lost lies below the weights' own rounding.

A singular vector's sign is arbitrary, and libraries choose it differently: here the entry of largest magnitude of every
left vector is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ALGORITHMS = ("auto", "full", "gram", "krylov")
# A Krylov space of up to DEPTH + 1 blocks; beyond this part of the whole space the full eigendecomposition is cheaper.
DEPTH, LARGEST_SPACE = 8, 0.5
MAX_RESTARTS = 8
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
        algorithm = "krylov" if end is not None and _fits(len(indices), n) else "gram"
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


def _fits(K: int, n: int) -> bool:
    """Whether a Krylov space of K vectors' blocks is much smaller than the whole space."""
    return LARGEST_SPACE * n >= (DEPTH + 1) * (K + OVERSAMPLING)


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
    """(n, K) eigenvectors of the K largest or smallest eigenvalues of G (n, n), those of larger ones first."""
    n, factor = len(G), None
    if not largest:
        # The shift keeps a singular G positive definite, and moves no eigenvector.
        shift = 8 * n * torch.finfo(G.dtype).eps * G.diagonal().sum() / n
        factor, failed = torch.linalg.cholesky_ex(G + shift * torch.eye(n, dtype=G.dtype, device=G.device))
        if failed:
            return torch.linalg.eigh(G).eigenvectors[:, :K].flip(1)

    def apply(X: Tensor) -> Tensor:
        return G @ X if factor is None else torch.cholesky_solve(X, factor)

    block = min(K + OVERSAMPLING, n)
    # A fixed stream, drawn on the CPU: equal on every rank and device, and nobody else's random numbers change.
    drawn = torch.randn(n, block, dtype=G.dtype, generator=torch.Generator().manual_seed(0))
    X = torch.linalg.qr(drawn.to(G.device)).Q
    residual, restarts = torch.inf, MAX_RESTARTS if _fits(K, n) else 0
    while restarts > 0:
        Q, applied = _krylov_space(apply, X)
        values, mixing = torch.linalg.eigh(_symmetric(Q.T @ applied))
        mixing = mixing.flip(1)[:, :block]
        X, ahead = Q @ mixing, applied @ mixing
        values = values.flip(0)[:block]
        before, residual = residual, _residual(X[:, :K], ahead[:, :K], values[:K])
        if residual <= RESIDUAL:
            return X[:, :K] if largest else X[:, :K].flip(1)
        restarts -= 1
        # At the rate of this restart, would the rest be enough?
        if residual * min(residual / before, 1.0) ** restarts > RESIDUAL and before < torch.inf:
            break
        X = torch.linalg.qr(X).Q
    eigenvectors = torch.linalg.eigh(G).eigenvectors  # no gap at the edge: the space would have to be too large
    return eigenvectors[:, -K:].flip(1) if largest else eigenvectors[:, :K].flip(1)


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


def _symmetric(H: Tensor) -> Tensor:
    return (H + H.T) / 2
