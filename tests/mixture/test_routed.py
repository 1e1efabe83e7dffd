"""Router, experts and frozen layer in one autograd function, and stacked copies of frozen factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ds_moelora.mixture import dense
from ds_moelora.mixture.compiled import COMPILED
from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.grouped import GROUPED
from ds_moelora.mixture.moe_lora import moe_lora
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routed import routed_moe_lora
from ds_moelora.pairs import GATE_SCALINGS, GateSettings

T, I, O, E, k, r = 9, 5, 4, 6, 3, 2
NAMES = ("x", "router", "A", "B")


def leaves(num_A: int = E) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(T, I), (E, I), (num_A, I, r), (E, O, r)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


W = torch.randn(O, I, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
DY = torch.randn(T, O, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """What `COMPILED` has compiled runs as it is written; tests/mixture/test_compiled.py compiles it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("compute", [DENSE, GROUPED, COMPILED])
@pytest.mark.parametrize("num_A", [1, E])
def test_gradients_of_everything_that_sees_x(compute, num_A: int) -> None:
    """Every gate scaling, with and without the frozen layer's share, and an auxiliary loss on the logits."""
    for gate_scaling, scale_input_grad, fused in itertools.product(GATE_SCALINGS, (False, True), (False, True)):
        x, router, A, B = actual = leaves(num_A)
        settings = GateSettings(gate_scaling, scale_input_grad)
        base = (x.detach() if fused else x) @ W.t()
        y, logits, chosen = routed_moe_lora(
            base, x, router, A, B, 1.3, k, None, 2.0, settings, True, compute, W if fused else None
        )
        ((y * DY).sum() + logits.square().sum()).backward()
        z, other_router, other_A, other_B = expected = leaves(num_A)
        out = reference_layer(
            z, z @ W.t(), other_A, other_B, other_router, k, 1.3, gate_scaling, scale_input_grad, chosen, 2.0
        )
        ((out * DY).sum() + (z @ other_router.t() / 2).square().sum()).backward()
        errors = {"y": max_relative_error(y, out)}
        errors |= {n: max_relative_error(a.grad, b.grad) for n, a, b in zip(NAMES, actual, expected, strict=True)}
        assert max(errors.values()) < 1e-12, (settings, fused, errors)


@pytest.mark.parametrize("num_A", [1, E])
def test_products_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch, num_A: int) -> None:
    """The gates' gradient, of so many experts at a time; the last part is smaller."""

    def grads() -> list[torch.Tensor | None]:
        x, router, A, B = tensors = leaves(num_A)
        routed_moe_lora(x.detach() @ W.t(), x, router, A, B, 1.3, k, compute=DENSE, base_weight=W)[0].backward(DY)
        return [tensor.grad for tensor in tensors]

    whole = grads()
    for experts_at_once in (1, 4):
        monkeypatch.setattr(dense, "PRODUCTS_AT_ONCE", experts_at_once * r * T + 1)
        assert all(torch.equal(a, b) for a, b in zip(grads(), whole, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("compute", [DENSE, GROUPED, COMPILED])
@pytest.mark.parametrize("wanted", range(4))
def test_only_the_wanted_gradient(compute, wanted: int) -> None:
    def grads(which: list[int]) -> list[torch.Tensor | None]:
        tensors = leaves()
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in which)
        x, router, A, B = tensors
        y, *_ = routed_moe_lora(
            x.detach() @ W.t(), x, router, A, B, 1.0, k, settings=GateSettings("sqrt"), compute=compute, base_weight=W
        )
        y.backward(DY)
        return [tensor.grad for tensor in tensors]

    every, one = grads([0, 1, 2, 3]), grads([wanted])
    assert all((grad is not None) == (i == wanted) for i, grad in enumerate(one))
    torch.testing.assert_close(one[wanted], every[wanted], rtol=1e-13, atol=1e-13)


def test_the_mixture_alone_takes_the_frozen_layer_along() -> None:
    x, _, A, B = leaves()
    gates = torch.rand(T, E, dtype=torch.float64)
    alone, together = [x.detach().clone().requires_grad_() for _ in range(2)]
    moe_lora(alone @ W.t(), alone, gates, gates > 0, A, B, 1.0).backward(DY)
    moe_lora(together.detach() @ W.t(), together, gates, gates > 0, A, B, 1.0, base_weight=W).backward(DY)
    torch.testing.assert_close(together.grad, alone.grad)


def test_without_autograd_the_same_values() -> None:
    x, router, A, B = leaves()
    y, logits, chosen = routed_moe_lora(x.detach() @ W.t(), x, router, A, B, 1.0, k)
    with torch.no_grad():
        again = routed_moe_lora(x @ W.t(), x, router, A, B, 1.0, k)
    assert all(torch.equal(a, b) for a, b in zip((y, logits, chosen), again, strict=True))


def test_kept_copies_of_frozen_factors_follow_their_changes() -> None:
    x, _, A, B = (t.detach() for t in leaves())
    gates = torch.rand(T, E, dtype=torch.float64)

    def run(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return moe_lora(torch.zeros(T, O, dtype=torch.float64), x, gates, gates > 0, A, B, 1.0)

    frozen = [nn.Parameter(t.clone(), requires_grad=False) for t in (A, B)]
    assert torch.equal(run(*frozen), run(A, B))
    with torch.no_grad():
        frozen[0].mul_(2)
    assert torch.equal(run(*frozen), run(A * 2, B))
    frozen[1].data = B * 3
    assert torch.equal(run(*frozen), run(A * 2, B * 3))
    assert run(frozen[0].float(), frozen[1].float()).dtype == torch.float64
    trained = [nn.Parameter(t.clone()) for t in (A, B)]
    run(*trained)
    trained[0].data.copy_(A * 2)  # as an optimizer does it, without a trace
    assert torch.equal(run(*trained), run(A * 2, B))
