"""The Riemannian preconditioner of a low-rank product, on local tensors.

For `W = s * B A` with A: (r, in) and B: (out, r), the metric induced on the factors by that of W preconditions their
gradients by the small Gram matrices of the *other* factor (Zhang & Pilanci, arXiv 2402.02347, eq. 3):

    dA = (B^T B + d I)^-1 grad_A          dB = grad_B (A A^T + d I)^-1

The metric of s B A itself divides both by s^2 (the optimizers' `include_scaling`).

Factors are stored rank last, A as (E, in, r) and B as (E, out, r), so that both lines read the same: every *row*
(r consecutive elements) of one factor's gradient is multiplied from the right by the inverse of the other factor's
Gram matrix. Any set of whole rows can thus be preconditioned where it lies, given only r x r matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this multiple of the trace, a Gram matrix of fp32 sums is singular for all that fp32 can tell. The same bound
# holds in float64, so that all precisions compute the same function.
RELATIVE_DAMPING = torch.finfo(torch.float32).eps
SECOND_ATTEMPT = 64
# A direction of the rows m is taken for rounding below this part of |m|^2. Gradients computed in bf16 decide: an error
# of up to 2^-9 in every element is 4e-6 of |m|^2, spread over r directions.
NOISE = 64 * RELATIVE_DAMPING


def algebra_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the r x r algebra: float32 whatever the model's dtype, float64 if the model's is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gram(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gram matrices `rows^T rows`.

    For small r, 16 // r rows are laid side by side: the Gram matrix is the sum of the diagonal blocks of that of the
    wider rows. More operations, but in products that fill a vector register (r = 1: 4 times faster, r = 4: 1.4 times).

    Args:
        rows: (..., n, r); any n, 0 included.
        dtype: of the sum and the result.

    Returns:
        (..., r, r).
    """
    rows = rows.to(dtype)
    *lead, n, r = rows.shape
    side = 16 // r
    if side < 4 or n % side or not rows.is_contiguous():
        return rows.mT @ rows
    wide = rows.view(*lead, n // side, side * r)
    return (wide.mT @ wide).view(*lead, side, r, side, r).diagonal(dim1=-4, dim2=-2).sum(-1)


def effective_damping(grams: Tensor, damping: Tensor | float) -> Tensor:
    """`max(damping, eps_fp32 * trace)`: what is below the second bound cannot be told from rounding in fp32.

    Args:
        grams: (..., r, r).
        damping: scalar, or (...,).

    Returns:
        (...,).
    """
    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    # `tiny` keeps damping=0 finite where a factor is exactly zero (B at the start): the gradient there is zero too.
    floor = (RELATIVE_DAMPING * trace).clamp_min(torch.finfo(torch.float32).tiny)
    if isinstance(damping, Tensor):
        return torch.maximum(floor, damping.to(grams.dtype))
    return floor.clamp_min(damping)  # a tensor made of the number would be a copy to the device that the host waits for


def _attempt(grams: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of `G + d I`, and which of them can be used: (N, r, r), (N,) -> (N, r, r), (N,).

    In exact arithmetic every squared pivot is at least d, and no eigenvalue of the inverse exceeds 1 / d, so that its
    norm is at most sqrt(r) / d. What is far off is rounding noise, and would make a step as much too long without any
    sign of failure. Both are looked at: an eigenvalue can be far smaller than every pivot.
    """
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    factors, failed = torch.linalg.cholesky_ex(grams + d[:, None, None] * identity)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    sound = (failed == 0) & (pivots.amin(-1) >= 0.5 * d)
    inverses = torch.cholesky_inverse(torch.where(sound[:, None, None], factors, identity))
    squared_norms = (inverses * d[:, None, None]).square().sum((-2, -1))
    return inverses, sound & (squared_norms <= 4 * grams.shape[-1])


def on_host(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values costs no wait for a device."""
    return tensor.device.type == "cpu"


def damped_inverse(grams: Tensor, damping: Tensor | float) -> Tensor:
    """`(G + d I)^-1` with `d = effective_damping(G, damping)`, by batched Cholesky.

    No failure, and on GPUs neither a branch nor a host synchronisation. A singular G, rounded to fp32, is indefinite
    by a few eps * trace: where that spoils the factorisation, d is raised to 64 eps_fp32 * trace, and in the last
    resort G is replaced by its upper bound `trace I`: a shorter step, never a wrong one. A G with a NaN or an infinity
    gives an inverse of NaNs: the update is visibly broken wherever that expert is used, never silently plain, nor
    nought.

    Args:
        grams: (N, r, r), symmetric positive semi-definite, float32 or float64.
        damping: scalar, or (N,).

    Returns:
        (N, r, r), symmetric positive definite.
    """
    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
    d = effective_damping(grams, damping)
    first, first_usable = _attempt(grams, d)
    if on_host(grams) and bool(first_usable.all()) and bool(grams.isfinite().all()):
        return first  # what the lines below would return
    second, second_usable = _attempt(grams, torch.maximum(d, SECOND_ATTEMPT * RELATIVE_DAMPING * trace))
    # Not finite: x * 0 is NaN for inf and NaN alike. LAPACK leaves finite garbage there, so what went in decides.
    poison = (grams * 0).sum((-2, -1), keepdim=True)
    bound = (trace + d).nan_to_num(1.0).reciprocal()
    last = torch.diag_embed(bound[:, None].expand(-1, grams.shape[-1]))
    inverse = torch.where(first_usable[:, None, None], first, torch.where(second_usable[:, None, None], second, last))
    return torch.where(poison == 0, inverse, last) + poison


def spectral_matrices(grams: Tensor, gradient_grams: Tensor, damping: Tensor | float, waits: Tensor | float) -> Tensor:
    """What makes the rows of m those of `msign(m R) R`, R = (G + d I)^(-1/2), d = effective_damping(G, damping).

    Of X = m R the polar factor is X (X^T X)^(-1/2), so that msign(m R) R = m R (R M R)^(-1/2) R with M = m^T m. Any
    other root T of (G + d I)^-1 = T T^T gives the same; here T = L^-T of the Cholesky factor, which cannot fail in
    float64, as d is at least eps_fp32 * trace. With the eigenvalues l_i = |m u_i|^2 of T^T M T, where u_i = T v_i, the
    result is the sum of u_i u_i^T / sqrt(l_i) over the directions that are more than rounding,
    l_i > NOISE |m|^2 |u_i|^2. In the others the step is 0.

    `torch.linalg.eigh` reports its failures to the host: on a GPU this waits for the device.

    Args:
        grams: G, (N, r, r), symmetric positive semi-definite. gradient_grams: M, likewise.
        damping: scalar, or (N,). waits: scalar or (N,); where not 0, the result is 0 while trace(G) <= r d.

    Returns:
        (N, r, r), symmetric positive semi-definite; NaN where G or M is not finite.
    """
    poison = (grams * 0 + gradient_grams * 0).sum((-2, -1), keepdim=True)
    G, M = (gram.double().nan_to_num(0.0, 0.0, 0.0) for gram in (grams, gradient_grams))
    d, identity = effective_damping(G, damping), torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L, _ = torch.linalg.cholesky_ex(G + d[:, None, None] * identity)
    T = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
    values, vectors = torch.linalg.eigh(T.mT @ M @ T)
    U = T @ vectors
    size = M.diagonal(dim1=-2, dim2=-1).sum(-1)
    size = torch.where(size > torch.finfo(torch.float32).tiny / NOISE, size, torch.inf)  # squares that fp32 has lost
    weights = torch.where(values > NOISE * size[:, None] * U.square().sum(-2), values, torch.inf).rsqrt()
    starts = G.diagonal(dim1=-2, dim2=-1).sum(-1) > G.shape[-1] * d
    weights = weights * (starts | (torch.as_tensor(waits, device=G.device) == 0))[:, None]
    return ((U * weights[:, None, :]) @ U.mT).to(grams.dtype) + poison


def precondition_(grad_rows: Tensor, inverses: Tensor) -> None:
    """`grad_rows @ inverses`, in place, computed in the dtype of `inverses`.

    Args:
        grad_rows: (N, n, r), any strides.
        inverses: (N, r, r).
    """
    grad_rows.copy_(torch.bmm(grad_rows.to(inverses.dtype), inverses))


def condition_numbers(grams: Tensor, damping: Tensor | float, inverses: Tensor) -> Tensor:
    """|G + d I|_F |(G + d I)^-1|_F / r, d the damping that the step uses: 1 for multiples of the identity.

    At least the spectral condition number over r, and at most that number itself; without an eigendecomposition, which
    would make a GPU's host wait.

    Args:
        grams: (N, r, r). damping: scalar or (N,). inverses: (N, r, r) of G + d I.

    Returns:
        (N,).
    """
    d = effective_damping(grams, damping)
    damped = grams + d[:, None, None] * torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    return damped.norm(dim=(1, 2)) * inverses.norm(dim=(1, 2)) / grams.shape[-1]
