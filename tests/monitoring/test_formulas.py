"""The formulas of monitoring against slow ones: token by token, pair by pair, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.mixture.routing import chosen_by, route
from ds_moelora.monitoring.formulas import (
    SKETCH_DIM,
    load_over_ideal,
    mean_similarity,
    projection,
    router_sums,
    sketch_products,
)
from ds_moelora.optimizer.preconditioner import condition_numbers, damped_inverse


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_router_sums(S: int, N: int, E: int, padded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, k = torch.randn(S, N, E, generator=generator), min(2, E)
    chosen = chosen_by(route(logits.view(-1, E), k)).view(S, N, E)
    real = torch.randint(0, 2, (S, N), generator=generator) if padded else None
    slots, sums = [0] * E, [0.0, 0.0, 0, 0]  # entropy, balance, tokens, sequences
    for s in range(S):
        mine = [n for n in range(N) if real is None or real[s, n]]
        p = logits[s, mine].double().softmax(-1)
        sums[2] += len(mine)
        for row, n in zip(p, mine, strict=True):
            sums[0] -= sum(q.item() * math.log(q.item()) for q in row) / math.log(E) if E > 1 else 0.0
            for e in range(E):
                slots[e] += int(chosen[s, n, e])
        if mine:
            shares = chosen[s, mine].double().sum(0) / (k * len(mine))
            sums[1] += E * (shares * p.mean(0)).sum().item()
            sums[3] += 1
    found = router_sums(logits, chosen, real).tolist()
    assert found[2:] == [*sums[2:], *slots]
    assert found[:2] == pytest.approx(sums[:2], rel=1e-5, abs=1e-6)


def test_loads() -> None:
    """Layers of different sizes; one that saw nothing."""
    slots = torch.tensor([[6.0, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    loads = load_over_ideal(slots, torch.tensor([2, 4, 3]))
    assert loads[0, :2].tolist() == [1.5, 0.5]
    assert loads[1].tolist() == [1.0] * 4
    assert loads[0, 2:].isnan().all()
    assert loads[2].isnan().all()


def products(E: int, features: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    A, B = torch.randn(E, features, r), torch.randn(E, features + 3, r)
    A[1], B[1] = 3 * A[0], B[0]  # a double
    return A, B


def slow_similarity(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    cosines = []
    for A, B in layers:
        W = [(B[i].double() @ A[i % len(A)].double().T).flatten() for i in range(len(B))]
        cosines += [torch.cosine_similarity(v, w, dim=0).item() for v, w in itertools.combinations(W, 2)]
    return sum(cosines) / len(cosines)


def sketched(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return sketch_products(A, B, projection(A.shape[1]), projection(B.shape[1]))


@pytest.mark.parametrize("shared", [False, True])
def test_similarity_of_small_experts_is_exact(shared: bool) -> None:
    layers = [products(4, SKETCH_DIM - 3, 2), products(4, 5, 2)]
    if shared:
        layers = [(A[:1], B) for A, B in layers]
    found = mean_similarity(torch.stack([sketched(A, B) for A, B in layers]))
    assert found.item() == pytest.approx(slow_similarity(layers), abs=1e-5)


def test_similarity_of_large_experts() -> None:
    """Within the sketch's noise, 1 / 16 per pair; doubles are recognised exactly, a zero expert is left out."""
    A, B = products(6, 300, 4)
    assert mean_similarity(sketched(A, B)[None]).item() == pytest.approx(slow_similarity([(A, B)]), abs=1 / SKETCH_DIM)
    assert mean_similarity(sketched(A[:2], B[:2])[None]).item() == pytest.approx(1, abs=1e-5)
    B[2:] = 0
    assert mean_similarity(sketched(A, B)[None]).item() == pytest.approx(1, abs=1e-5)
    assert mean_similarity(sketched(A, 0 * B)[None]).isnan()


def test_condition_numbers() -> None:
    """Between the spectral condition number over r and that number; 1 for multiples of the identity."""
    torch.manual_seed(0)
    rows = torch.randn(5, 30, 4) * torch.tensor([1.0, 1, 3, 10])
    grams = torch.cat([rows.mT @ rows, 7 * torch.eye(4)[None]])
    found = condition_numbers(grams, 0.1, damped_inverse(grams, 0.1))
    exact = torch.linalg.cond((grams + 0.1 * torch.eye(4)).double())
    assert (found <= exact * (1 + 1e-4)).all()
    assert (found >= exact / 4 * (1 - 1e-4)).all()
    assert found[-1].item() == pytest.approx(1, rel=1e-5)
