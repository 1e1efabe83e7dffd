"""GateRiemannianMuon by itself: what its step is, what it does not depend on, and where it stands still."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_moelora import GateRiemannianMuon
from ds_moelora.optimizer.preconditioner import NOISE, spectral_matrices
from ds_moelora.optimizer.reference import spectral_rows
from ds_moelora.optimizer.step_statistics import StepStatistics
from ds_moelora.pairs import LoraPair, tag_pair

from ..support.mixture import SHAPES, Mixture, Stack, batches
from ..support.training import OPTIMIZERS

KIND = "GateRiemannianMuon"
DOUBLE = torch.float64


def pair(A: Tensor, B: Tensor, scaling: float = 1.0) -> list[nn.Parameter]:
    """Parameters of one expert (or of all, (E, n, r)), tagged."""
    params = [nn.Parameter(f.clone() if f.dim() == 3 else f.clone()[None]) for f in (A, B)]
    tag_pair(LoraPair("layer", params[0].shape[0], A.shape[-1], scaling), *params)
    return params


def product(params: list[nn.Parameter], scaling: float = 1.0) -> Tensor:
    A, B = (p.detach() for p in params)
    return scaling * B @ A.mT


def change(A: Tensor, B: Tensor, G: Tensor, scaling: float = 1.0, **options: Any) -> Tensor:
    """Of s B A in one step by the gradient G of the product; first order in lr."""
    params = pair(A, B, scaling)
    params[0].grad, params[1].grad = scaling * (G.T @ B)[None], scaling * (G @ A)[None]
    GateRiemannianMuon(params, lr=1e-6, **{"damping": 0.0, **options}).step()
    return (product(params, scaling)[0] - scaling * B @ A.T) / 1e-6


def well_conditioned(n: int, r: int, generator: torch.Generator, spread: float = 2.0) -> Tensor:
    """(n, r) with singular values from 1 to `spread`."""
    U, _, Vh = torch.linalg.svd(torch.randn(n, r, dtype=DOUBLE, generator=generator), full_matrices=False)
    return U * torch.linspace(1.0, spread, r, dtype=DOUBLE) @ Vh


@given(r=st.integers(1, 5), extra=st.integers(0, 6), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_step_does_not_depend_on_the_split_between_the_factors(r: int, extra: int, seed: int) -> None:
    """(A, B) -> (A M, B M^-T), and (A, B, s) -> (A / sqrt(c), B / sqrt(c), c s): the same change of s B A."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (well_conditioned(r + extra + k, r, generator) for k in (0, 1))
    M = well_conditioned(r, r, generator, spread=3.0)
    G = torch.randn(len(B), len(A), dtype=DOUBLE, generator=generator)
    wanted = change(A, B, G, 0.7)
    torch.testing.assert_close(change(A @ M, B @ torch.linalg.inv(M).T, G, 0.7), wanted, rtol=1e-3, atol=1e-3)
    for c in (0.01, 9.0):
        torch.testing.assert_close(change(A / c**0.5, B / c**0.5, G, 0.7 * c), wanted, rtol=1e-3, atol=1e-3)
    assert wanted.norm() > 0.1


def test_orthonormal_factors_make_muons_step() -> None:
    """With A^T A = B^T B = I: each factor moves by lr / 2 times U V^T of its gradient."""
    A, B = (torch.linalg.qr(torch.randn(2, n, 3, dtype=DOUBLE))[0] for n in (6, 5))
    params = pair(A, B)
    for p in params:
        p.grad = torch.randn_like(p)
    grads = [p.grad.clone() for p in params]
    GateRiemannianMuon(params, lr=0.5, damping=0.0).step()
    for p, old, grad in zip(params, (A, B), grads, strict=True):
        U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
        torch.testing.assert_close(p.detach(), old - 0.25 * U @ Vh, rtol=1e-6, atol=1e-6)


def test_the_product_moves_by_lr_whatever_its_size() -> None:
    """First order: |d (s B A)| <= lr in the spectral norm, and equal to lr where both factors' steps agree."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1.0, 1e2):
        A, B = (size * well_conditioned(n, 4, generator, spread=5.0) for n in (9, 8))
        norm = torch.linalg.matrix_norm(change(A, B, B @ A.T, 2.0), 2)
        assert norm == pytest.approx(1.0, rel=1e-2)
        assert torch.linalg.matrix_norm(change(A, B, torch.randn(8, 9, dtype=DOUBLE), 2.0), 2) < 1.01


def test_a_waits_for_b() -> None:
    """B = 0: no step of A, however small the noise in its gradient; B moves, and A with it from the next step on."""
    torch.manual_seed(0)
    params = pair(torch.randn(2, 6, 3), torch.zeros(2, 5, 3))
    params[1].data[1] = torch.randn(5, 3)  # the other expert's has begun
    optimizer = GateRiemannianMuon(params, lr=1e-2)
    A, B = (p.detach().clone() for p in params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert torch.equal(params[0][0], A[0])
    assert not torch.equal(params[0][1], A[1])
    assert ((params[1].detach() - B).flatten(1).norm(dim=1) > 1e-4).all()
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert not torch.equal(params[0][0], before[0])


@pytest.mark.parametrize(("scale", "waits"), [(0.99, True), (1.01, False)])
def test_a_waits_until_the_trace_is_above_r_d(scale: float, waits: bool) -> None:
    B = torch.full((5, 3), math.sqrt(scale * 1e-2 / 5))  # trace(B^T B) = scale r d
    params = pair(torch.randn(6, 3), B)
    params[0].grad, params[1].grad = (torch.randn_like(p) for p in params)
    A = params[0].detach().clone()
    GateRiemannianMuon(params, lr=1e-2, damping=1e-2).step()
    assert torch.equal(params[0], A) is waits


@given(r=st.integers(2, 9), n=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_singular_directions_get_nothing(r: int, n: int, seed: int) -> None:
    """m of rank 1, in fp32, where its Gram matrix is anything but singular: the step has rank 1, and length 1."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(n, 1, generator=generator) @ torch.randn(1, r, generator=generator)
    m = m * 10.0 ** torch.randint(-6, 6, (), generator=generator)
    S = torch.eye(r) + 0.1
    step = m @ spectral_matrices(S[None], (m.T @ m)[None], 0.0, 0.0)[0]
    expected = spectral_rows(m.double(), S.double(), 0.0)
    torch.testing.assert_close(step.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.linalg.matrix_norm(step, 2) < 1.01


def test_a_direction_is_noise_by_its_share_of_m() -> None:
    for share, kept in ((0.5, False), (2.0, True)):
        small = math.sqrt(share * NOISE)
        m = torch.tensor([[1.0, 0.0], [0.0, small]])
        step = m @ spectral_matrices(torch.eye(2)[None], (m.T @ m)[None], 0.0, 0.0)[0]
        assert step[1, 1].item() == pytest.approx(1.0 if kept else 0.0, abs=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stays_visible_and_local(value: float) -> None:
    G, M = torch.eye(3).repeat(3, 1, 1), torch.eye(3).repeat(3, 1, 1)
    G[0, 0, 0] = M[1, 2, 1] = value
    found = spectral_matrices(G, M, 1e-6, 1.0)
    assert found[:2].isnan().all()
    torch.testing.assert_close(found[2], torch.eye(3))


def test_no_gradient_no_step() -> None:
    """An expert that saw no token decays alone; so does one whose squares fp32 cannot hold."""
    params = pair(torch.randn(2, 6, 3), torch.randn(2, 5, 3))
    for p in params:
        p.grad = torch.zeros_like(p)
        p.grad[1] = 1e-30 * torch.randn_like(p[1])
    before = [p.detach().clone() for p in params]
    GateRiemannianMuon(params, lr=0.1, weight_decay=0.5).step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), math.sqrt(0.95) * old)


def test_split_decay_is_the_products() -> None:
    """lr * weight_decay of the product goes in a step, half of it from each factor."""
    params = pair(torch.randn(2, 6, 3, dtype=DOUBLE), torch.randn(2, 5, 3, dtype=DOUBLE))
    for p in params:
        p.grad = torch.zeros_like(p)
    old = product(params)
    GateRiemannianMuon(params, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(product(params), 0.95 * old)


def test_other_parameters_follow_torch_adamw_exactly() -> None:
    """Routers and biases; also while a scheduler moves lr, as the ratio of both rates stays."""
    ours, theirs = Stack(SHAPES), Stack(SHAPES)
    rest = [n for n, p in ours.named_parameters() if p.requires_grad and not n.endswith(("lora_A", "lora_B"))]
    options = {**OPTIMIZERS[KIND], "lr": 2**-7, "aux_lr": 2**-8}
    optimizer: Any = GateRiemannianMuon([p for p in ours.parameters() if p.requires_grad], **options)
    named = dict(theirs.named_parameters())
    plain: Any = torch.optim.AdamW(
        [named[n] for n in rest], lr=2**-8, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1, fused=True
    )
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 2.0**-step) for o in (optimizer, plain)]
    assert len(optimizer.param_groups) == 2
    for micro in batches(4, 1, 1):
        x, target = micro[0][0]
        for o, model in ((optimizer, ours), (plain, theirs)):
            o.zero_grad()
            if model is ours:
                model(x, target).backward()
        for (_, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for o, scheduler in zip((optimizer, plain), schedulers, strict=True):
            o.step()
            scheduler.step()
        for name in rest:
            assert torch.equal(ours.get_parameter(name), named[name]), name


def test_groups() -> None:
    """Factors, routers and the rest apart, each with what a step multiplies lr by; state of one moment for factors."""
    model = Stack(SHAPES)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = GateRiemannianMuon(params, lr=0.1, aux_lr=0.2, gate_lr_scale=0.5)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 2.0, 1.0]
    roles = [{getattr(p, "lora_role", None) for p in group["params"]} for group in optimizer.param_groups]
    assert roles == [{"A", "B"}, {None}, {"router"}]
    x, target = batches(1, 1, 1)[0][0][0]
    model(x, target).backward()
    optimizer.step()
    assert all(optimizer.state[p].keys() == {"step", "exp_avg"} for p in optimizer.param_groups[0]["params"])
    copied = copy.deepcopy(optimizer.state_dict())
    other = GateRiemannianMuon(params, lr=9.0, aux_lr=9.0, gate_lr_scale=0.1)
    other.load_state_dict(copied)
    assert [group["lr_scale"] for group in other.param_groups] == [1.0, 2.0, 1.0]


def test_watched_steps_are_the_same_steps() -> None:
    """What monitoring reports: the raw gradient, the product with the matrices, and what the weights moved by."""
    A, B, grads = torch.randn(2, 6, 3), torch.randn(2, 5, 3), (torch.randn(2, 6, 3), torch.randn(2, 5, 3))
    plain, watched = pair(A, B), pair(A, B)
    statistics = StepStatistics()
    for params in (plain, watched):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer = GateRiemannianMuon(params, lr=0.1)
        optimizer.statistics = statistics if params is watched else None
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))
    moved = [p.detach() - old for p, old in zip(plain, (A, B), strict=True)]
    for found, tensors in (
        (statistics.raw, grads),
        (statistics.weight, (A, B)),
        (statistics.update, moved),
        (statistics.preconditioned, [step / 0.1 for step in moved]),
    ):
        assert found is not None
        assert float(found) == pytest.approx(sum(float(t.square().sum()) for t in tensors), rel=1e-4)
    assert float(statistics.condition) >= 1 / 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"momentum": 1.0}, "momentum=1.0 must be from 0 to below 1"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"weight_decay": 100.0}, "weight_decay=100.0 times lr=0.1 must be below 1"),
        ({"aux_lr": -1.0}, "aux_lr=-1.0 must be a finite number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    params = [p for p in Mixture("m", 5, 7, 2, 3, 1).parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        GateRiemannianMuon(params, **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        GateRiemannianMuon([{"params": params, **options}], lr=0.1)
