"""Singular triplets and the experts made of them, against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.mixture import svd
from ds_moelora.mixture.goat import VARIANTS, check_rank, goat_scaling, mean_product, starting_factors, triplet_indices
from ds_moelora.mixture.svd import singular_triplets


def weight(out_features: int, in_features: int, decay: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Gaussian (decay 0), or with singular values k^-decay."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    if decay:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U * torch.arange(1.0, len(S) + 1, dtype=torch.float64) ** -decay) @ Vh
    return W


@given(
    out_features=st.integers(1, 30),
    in_features=st.integers(1, 30),
    experts=st.integers(1, 5),
    variant=st.sampled_from(VARIANTS),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_factors_follow_the_formulas(out_features, in_features, experts, variant, data) -> None:
    """s B_i A_i = U_i S_i V_i^T / rho, for every shape, against torch's own full SVD."""
    n = min(out_features, in_features)
    if n < experts:
        with pytest.raises(ValueError, match="does not fit"):
            check_rank(in_features, out_features, experts, 1, "layer")
        return
    rank = data.draw(st.integers(1, n // experts))
    check_rank(in_features, out_features, experts, rank, "layer")
    with pytest.raises(ValueError, match=rf"Use r <= {n // experts}"):
        check_rank(in_features, out_features, experts, n // experts + 1, "layer")

    W, s, rho = weight(out_features, in_features), 1.7, 10.0
    indices = triplet_indices(n, experts, rank, variant)
    triplets = singular_triplets(W, indices.flatten())
    A, B = starting_factors(triplets, experts, s, rho)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for i in range(experts):
        mine = indices[i]
        product = s * B[i] @ A[i].T
        torch.testing.assert_close(product, (U[:, mine] * S[mine]) @ Vh[mine] / rho, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(A[i].norm(dim=0), (S[mine] / (s * rho)).sqrt(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(A[i].norm(dim=0), B[i].norm(dim=0), rtol=1e-8, atol=1e-10)
    mean = sum(s * B[i] @ A[i].T for i in range(experts)) / experts
    torch.testing.assert_close(mean_product(A, B, s), mean, rtol=1e-12, atol=1e-14)
    left = triplets.U
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_which_triplets() -> None:
    """11 singular values, 3 experts: segments of 3, two belong to none."""
    assert triplet_indices(11, 3, 2, "goat").tolist() == [[0, 1], [3, 4], [6, 7]]
    assert triplet_indices(11, 3, 2, "goat_mini").tolist() == [[1, 2], [4, 5], [7, 8]]
    assert triplet_indices(11, 3, 2, "pissa").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert triplet_indices(11, 3, 2, "milora").tolist() == [[5, 6], [7, 8], [9, 10]]
    for variant in VARIANTS:
        chosen = triplet_indices(64, 4, 16, variant).flatten().tolist()
        assert sorted(chosen) == list(range(64))
    with pytest.raises(ValueError, match="'dora' is unknown"):
        triplet_indices(64, 4, 16, "dora")


def test_equal_singular_values_have_orthonormal_triplets() -> None:
    """Any orthonormal triplets of equal singular values are right."""
    Q = torch.linalg.qr(weight(200, 200)).Q
    found = singular_triplets(Q, torch.arange(4))
    torch.testing.assert_close(found.S, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(Q @ found.V, found.U)
    torch.testing.assert_close(found.V.T @ found.V, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_the_weights_own_rounding(dtype) -> None:
    """A spectrum over six decades: the smallest singular values against the full decomposition in float64."""
    W = weight(96, 80, decay=3.0).to(dtype)
    found = singular_triplets(W, torch.arange(80))
    exact = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(found.S, exact, rtol=1e-7, atol=0)
    torch.testing.assert_close((found.U * found.S) @ found.V.T, W.double(), rtol=0, atol=1e-10)


def test_the_weight_goes_to_the_gpu_and_the_triplets_come_back(monkeypatch) -> None:
    """Which device is asked for; the product itself is the same on every one."""
    asked = []
    monkeypatch.setattr(svd, "work_device", lambda stored: asked.append(stored) or torch.device("cpu"))
    W = weight(6, 5).float()
    found = singular_triplets(W, torch.arange(2))
    assert asked == [W.device]
    assert all(t.device == W.device and t.dtype == torch.float64 for t in found)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert svd.work_device(torch.device("cpu")) == torch.device("cuda", 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_singular_weight_gives_finite_factors(variant) -> None:
    W = weight(200, 3) @ weight(3, 180)
    indices = triplet_indices(180, 4, 2, variant).flatten()
    A, B = starting_factors(singular_triplets(W, indices), 4, 2.0, 10.0)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    zero, _ = starting_factors(singular_triplets(torch.zeros(20, 30), indices[:4] * 0), 4, 2.0, 10.0)
    assert not zero.any()


def test_weights_that_are_not_finite_are_refused() -> None:
    W = weight(5, 4)
    W[1, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        singular_triplets(W, torch.arange(2))


def test_scaling() -> None:
    assert goat_scaling(1024, 4) == pytest.approx(math.sqrt(768))
    assert goat_scaling(1024, 4, eta=0.25) == pytest.approx(math.sqrt(192))
