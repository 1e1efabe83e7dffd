"""The r x r algebra: against float64, and where a Gram matrix is singular, empty or not finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_moelora.optimizer import preconditioner
from ds_moelora.optimizer.preconditioner import damped_inverse, effective_damping, gram, precondition_
from ds_moelora.optimizer.reference import damped_inverse as slow_inverse


@pytest.fixture(autouse=True, scope="module", params=["host", "device"])
def where(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a device, whose values nobody may look at, inverses are found by another way."""
    looks = preconditioner.on_host
    if request.param == "device":
        preconditioner.on_host = lambda tensor: False
    yield
    preconditioner.on_host = looks


@given(n=st.integers(0, 40), r=st.integers(1, 16), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_inverse_equals_the_reference(n: int, r: int, seed: int) -> None:
    rows = torch.randn(3, n, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    G = gram(rows, torch.float64)
    expected = torch.stack([slow_inverse(g, 1e-3) for g in G])
    torch.testing.assert_close(damped_inverse(G, 1e-3), expected, rtol=1e-8, atol=1e-8)


@given(
    r=st.integers(1, 32),
    n=st.integers(1, 300),
    distinct=st.integers(1, 3),
    scale=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
@example(r=19, n=236, distinct=1, scale=9, seed=3)  # pivots of d / 2 and more, and yet an eigenvalue of d / 21
@settings(max_examples=300, deadline=None)
def test_rank_deficient_grams_have_a_sound_inverse(r: int, n: int, distinct: int, scale: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(min(distinct, r), r, generator=generator) * 10.0**scale
    rows = torch.randn(n, len(basis), generator=generator) @ basis
    G = gram(rows[None])
    inverse = damped_inverse(G, 0.0)
    assert inverse.isfinite().all()
    # (G + d I)^-1 lies between 1 / (trace + d) and 1 / d. Here d is of the size of G's own rounding errors, which may
    # lower the smallest eigenvalues by a part of d; LAPACK alone fails on such matrices, or exceeds 1 / d by 1000.
    eigenvalues = torch.linalg.eigvalsh(inverse[0].double())
    trace, d = G[0].double().trace(), effective_damping(G, 0.0)[0].double()
    assert eigenvalues.max() <= 16 / d
    assert eigenvalues.min() >= 0.9 / (trace + d) - 1e-5 * eigenvalues.max()


def test_zero_factor_gives_the_damping_alone() -> None:
    torch.testing.assert_close(damped_inverse(torch.zeros(2, 3, 3), 1e-6), 1e6 * torch.eye(3).expand(2, 3, 3))


def test_damping_is_raised_to_what_fp32_can_resolve() -> None:
    G = 1e6 * torch.ones(1, 4, 4)
    assert effective_damping(G, 1e-6).item() == pytest.approx(torch.finfo(torch.float32).eps * 4e6)
    assert effective_damping(G, 10.0).item() == 10.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_stays_visible_and_local(value: float) -> None:
    G = torch.eye(3).repeat(2, 1, 1)
    G[0, 2, 1] = G[0, 1, 2] = value
    inverse = damped_inverse(G, 1e-6)
    assert inverse[0].isnan().all()
    torch.testing.assert_close(inverse[1], torch.eye(3))


def test_per_matrix_damping() -> None:
    inverse = damped_inverse(torch.zeros(2, 2, 2), torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(inverse, torch.stack([torch.eye(2), torch.eye(2) / 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_multiplied_in_place_through_any_strides(dtype: torch.dtype) -> None:
    grad = torch.randn(3, 5).to(dtype)
    M = torch.randn(1, 3, 3)
    expected = (grad.float().T @ M[0]).to(dtype).T
    precondition_(grad.T.unsqueeze(0), M)
    torch.testing.assert_close(grad, expected)
