"""Router, experts and frozen layer in one autograd function."""

from __future__ import annotations

import itertools

import pytest
import torch

from ds_moelora.mixture import dense
from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.fused import FUSED
from ds_moelora.mixture.grouped import GROUPED
from ds_moelora.mixture.grouped_mm import GROUPED_MM, why_not
from ds_moelora.mixture.mixture import Mixed, mix
from ds_moelora.mixture.operands import Operands, RoutingRule
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by
from ds_moelora.pairs import GATE_SCALINGS, GateSettings

pytestmark = pytest.mark.usefixtures("grouped_mm_in_any_dtype")

T, I, O, E, k, r = 9, 5, 4, 6, 3, 2
NAMES = ("x", "router", "A", "B")


def leaves(num_A: int = E) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(T, I), (E, I), (num_A, I, r), (E, O, r)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


W = torch.randn(O, I, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
DY = torch.randn(T, O, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def routed(
    base: torch.Tensor, tensors: list[torch.Tensor], s: float = 1.0, temperature: float = 1.0, **kwargs
) -> Mixed:
    x, router, A, B = tensors
    settings = kwargs.pop("settings", GateSettings())
    rule = RoutingRule(k, None, temperature)
    return mix(
        Operands(x=x, lora_A=A, lora_B=B, scaling=s, router=router, rule=rule, settings=settings), base, **kwargs
    )


@pytest.mark.parametrize("products", [DENSE, GROUPED, FUSED, GROUPED_MM])
@pytest.mark.parametrize("num_A", [1, E])
def test_gradients_of_everything_that_sees_x(products, num_A: int) -> None:
    """Every gate scaling, with and without the frozen layer's share, and an auxiliary loss on the logits."""
    if products is GROUPED_MM and num_A == 1:
        assert "share one A" in str(why_not(8, torch.bfloat16, None, 1))
        return
    for gate_scaling, scale_input_grad, fused in itertools.product(GATE_SCALINGS, (False, True), (False, True)):
        x = (actual := leaves(num_A))[0]
        settings = GateSettings(gate_scaling, scale_input_grad)
        base = (x.detach() if fused else x) @ W.t()
        weight = W if fused else None
        y, logits, gates = routed(
            base, actual, 1.3, 2.0, settings=settings, inplace=True, products=products, base_weight=weight
        )
        ((y * DY).sum() + logits.square().sum()).backward()
        z, other_router, other_A, other_B = expected = leaves(num_A)
        out = reference_layer(
            z, z @ W.t(), other_A, other_B, other_router, k, 1.3, gate_scaling, scale_input_grad, chosen_by(gates), 2.0
        )
        ((out * DY).sum() + (z @ other_router.t() / 2).square().sum()).backward()
        errors = {"y": max_relative_error(y, out)}
        errors |= {n: max_relative_error(a.grad, b.grad) for n, a, b in zip(NAMES, actual, expected, strict=True)}
        assert max(errors.values()) < 1e-12, (settings, fused, errors)


@pytest.mark.parametrize("num_A", [1, E])
def test_products_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch, num_A: int) -> None:
    """The gates' gradient, of so many experts at a time; the last part is smaller."""

    def grads() -> list[torch.Tensor | None]:
        tensors = leaves(num_A)
        routed(tensors[0].detach() @ W.t(), tensors, 1.3, base_weight=W).y.backward(DY)
        return [tensor.grad for tensor in tensors]

    whole = grads()
    for experts_at_once in (1, 4):
        monkeypatch.setattr(dense, "PRODUCTS_AT_ONCE", experts_at_once * r * T + 1)
        assert all(torch.equal(a, b) for a, b in zip(grads(), whole, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("products", [DENSE, GROUPED, FUSED, GROUPED_MM])
@pytest.mark.parametrize("wanted", range(4))
def test_only_the_wanted_gradient(products, wanted: int) -> None:
    def grads(which: list[int]) -> list[torch.Tensor | None]:
        tensors = leaves()
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in which)
        base = tensors[0].detach() @ W.t()
        routed(base, tensors, settings=GateSettings("sqrt"), products=products, base_weight=W).y.backward(DY)
        return [tensor.grad for tensor in tensors]

    every, one = grads([0, 1, 2, 3]), grads([wanted])
    assert all((grad is not None) == (i == wanted) for i, grad in enumerate(one))
    torch.testing.assert_close(one[wanted], every[wanted], rtol=1e-13, atol=1e-13)


def test_the_mixture_alone_takes_the_frozen_layer_along() -> None:
    x, _, A, B = leaves()
    gates = torch.rand(T, E, dtype=torch.float64)
    alone, together = [x.detach().clone().requires_grad_() for _ in range(2)]
    mix(Operands(x=alone, lora_A=A, lora_B=B, scaling=1.0, gates=gates), alone @ W.t()).y.backward(DY)
    operands = Operands(x=together, lora_A=A, lora_B=B, scaling=1.0, gates=gates)
    mix(operands, together.detach() @ W.t(), base_weight=W).y.backward(DY)
    torch.testing.assert_close(together.grad, alone.grad)


def test_without_autograd_the_same_values() -> None:
    tensors = leaves()
    base = tensors[0].detach() @ W.t()
    with_autograd = routed(base, tensors)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(with_autograd, routed(base, tensors), strict=True))
