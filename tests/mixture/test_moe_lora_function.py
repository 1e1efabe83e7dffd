"""The autograd function against the per-expert formula: every gate scaling, both settings of the input's gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.fused import FUSED
from ds_moelora.mixture.grouped import GROUPED
from ds_moelora.mixture.grouped_mm import GROUPED_MM
from ds_moelora.mixture.mixture import mix
from ds_moelora.mixture.operands import Operands, RoutingRule, gate_factor
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by, route
from ds_moelora.pairs import GATE_SCALINGS, GateSettings

pytestmark = pytest.mark.usefixtures("grouped_mm_in_any_dtype")

NAMES = ("x", "base", "A", "B", "router")
# The fast path sums over experts and ranks in another order: a few dozen roundings of 1.1e-16, 6e-8 and 4e-3.
# bfloat16 also rounds the intermediate p and q; 3 % of the largest entry is what that gives on these sizes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}

SHAPES = [  # T, I, O, E, k, r
    (7, 5, 3, 4, 2, 2),
    (1, 1, 1, 1, 1, 1),
    (1, 9, 7, 4, 2, 3),  # one token, as in decoding
    (1, 9, 7, 4, 2, 17),
    (13, 17, 11, 5, 5, 3),
    (6, 9, 33, 3, 1, 7),
    (32, 16, 16, 20, 10, 4),
    (5, 3, 2, 2, 1, 6),  # rank above both sizes
    (0, 4, 6, 3, 2, 2),  # no tokens
]


def make(shape, dtype=torch.float64, seed=0):
    T, I, O, E, _, r = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return [draw(T, I), draw(T, O), draw(E, I, r), draw(E, O, r), draw(E, I)], draw(T, O).detach()


def fast(tensors, k, s, gate, inplace=False, products=DENSE):
    x, base, A, B, router = tensors
    gates = route(x @ router.t(), k)
    # base * 1: a leaf may not be overwritten.
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=s, gates=gates, settings=gate, rule=RoutingRule(k))
    return mix(operands, base * 1, inplace=inplace, products=products).y, chosen_by(gates)


def compare(shape, gate_scaling, scale_input_grad, dtype=torch.float64, inplace=False, seed=0, s=1.7, products=DENSE):
    """Largest relative error of the output and each gradient against float64 autograd of the per-expert formula."""
    tensors, dy = make(shape, dtype, seed)
    y, chosen = fast(tensors, shape[4], s, GateSettings(gate_scaling, scale_input_grad), inplace, products)
    y.backward(dy)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    x, base, A, B, router = wide
    expected = reference_layer(x, base, A, B, router, shape[4], s, gate_scaling, scale_input_grad, chosen)
    expected.backward(dy.double())
    errors = {"y": max_relative_error(y, expected)}
    for name, actual, reference in zip(NAMES, tensors, wide, strict=True):
        assert actual.grad.dtype == dtype
        assert actual.grad.is_contiguous()
        errors[name] = max_relative_error(actual.grad, reference.grad)
    return errors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gate_scaling", "scale_input_grad"), list(itertools.product(GATE_SCALINGS, (False, True))))
def test_gradients_are_those_of_the_per_expert_formula(shape, gate_scaling, scale_input_grad):
    for dtype, inplace, products in itertools.product((torch.float64, torch.float32), (False, True), (DENSE, FUSED)):
        errors = compare(shape, gate_scaling, scale_input_grad, dtype, inplace, products=products)
        assert max(errors.values()) < TOLERANCE[dtype], (dtype, inplace, products.name, errors)


@given(
    shape=st.tuples(st.integers(0, 9), *[st.integers(1, 9)] * 3, st.integers(1, 9), st.integers(1, 5)),
    gate_scaling=st.sampled_from(GATE_SCALINGS),
    scale_input_grad=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    inplace=st.booleans(),
    seed=st.integers(0, 1000),
    products=st.sampled_from([DENSE, GROUPED, FUSED, GROUPED_MM]),
)
@settings(max_examples=100, deadline=None)
def test_gradients_for_any_sizes(shape, gate_scaling, scale_input_grad, dtype, inplace, seed, products):
    T, I, O, E, k, r = shape
    sizes = (T, I, O, E, min(k, E), r)
    errors = compare(sizes, gate_scaling, scale_input_grad, dtype, inplace, seed, products=products)
    # One expert's gate is constant; two nearly equal experts make the router's gradient a small difference.
    router = errors.pop("router")
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert E == 1 or router < 50 * TOLERANCE[dtype]


@pytest.mark.parametrize("products", [DENSE, FUSED])
@pytest.mark.parametrize("gate_scaling", GATE_SCALINGS)
def test_bfloat16(gate_scaling, products):
    errors = compare((64, 32, 24, 8, 2, 4), gate_scaling, False, torch.bfloat16, products=products)
    assert max(errors.values()) < TOLERANCE[torch.bfloat16], errors


def test_exact_setting_passes_gradcheck():
    tensors, _ = make((5, 4, 3, 3, 2, 2))
    assert torch.autograd.gradcheck(lambda *t: fast(t, 2, 1.7, GateSettings())[0], tensors, eps=1e-6, atol=1e-7)


def test_rank_level_detach_trap():
    """`detach` on the gated projection gives dB the factor g; ours is sqrt(g), which is clearly something else."""
    shape = (16, 6, 5, 4, 2, 3)
    tensors, dy = make(shape)
    fast(tensors, 2, 1.0, GateSettings("sqrt"))[0].backward(dy)
    x, base, A, B, router = [t.detach().clone().requires_grad_() for t in tensors]
    g = route(x @ router.t(), 2).unsqueeze(-1)
    p = torch.einsum("ti,eir->ter", x, A)
    trick = g.sqrt().detach() * p + (g - g.sqrt().detach()) * p.detach()
    (base + torch.einsum("ter,eor->to", trick, B)).backward(dy)
    assert max_relative_error(tensors[2].grad, A.grad) < 1e-12
    assert max_relative_error(tensors[3].grad, B.grad) > 0.1


def test_top_1_makes_all_gate_scalings_equal():
    gradients = []
    for gate_scaling in GATE_SCALINGS:
        tensors, dy = make((9, 5, 4, 3, 1, 2))
        fast(tensors, 1, 1.0, GateSettings(gate_scaling, True))[0].backward(dy)
        gradients.append([t.grad for t in tensors])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_full_counts_a_chosen_expert_whose_gate_underflows():
    logits = torch.tensor([[0.0, -1e4, -2e4]])
    gates = route(logits, 2)
    assert gates[0, 1] == 0
    assert gate_factor("full", gates).tolist() == [[1.0, 1.0, 0.0]]


def test_settings_are_read_when_the_backward_pass_runs():
    gate = GateSettings("none")
    tensors, dy = make((9, 5, 4, 3, 2, 2))
    y, _ = fast(tensors, 2, 1.0, gate)
    gate.gate_scaling = "sqrt"
    y.backward(dy)
    others, _ = make((9, 5, 4, 3, 2, 2))
    fast(others, 2, 1.0, GateSettings("sqrt"))[0].backward(dy)
    assert torch.equal(tensors[2].grad, others[2].grad)


def test_unknown_gate_scaling_names_the_known_ones():
    tensors, dy = make((3, 2, 2, 2, 1, 1))
    y, _ = fast(tensors, 1, 1.0, GateSettings("cube"))
    with pytest.raises(ValueError, match="'cube' is unknown; use one of none, sqrt, full"):
        y.backward(dy)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_wanted_gradient_is_computed(wanted):
    shape = (9, 5, 4, 3, 2, 2)
    every, dy = make(shape)
    fast(every, 2, 1.0, GateSettings("sqrt"))[0].backward(dy)
    one, _ = make(shape)
    for i, tensor in enumerate(one):
        tensor.requires_grad_(i == wanted)
    fast(one, 2, 1.0, GateSettings("sqrt"))[0].backward(dy)
    assert torch.equal(one[wanted].grad, every[wanted].grad)
    assert all(t.grad is None for i, t in enumerate(one) if i != wanted)


def test_second_derivative_is_refused():
    tensors, dy = make((3, 2, 2, 2, 1, 1))
    y, _ = fast(tensors, 1, 1.0, GateSettings())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, tensors[2], dy, create_graph=True)


def test_in_place_writes_onto_the_base_output_and_protects_it():
    tensors, _ = make((4, 3, 5, 2, 1, 2))
    x, base, A, B, router = tensors
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=1.0, gates=route(x @ router.t(), 1))
    storage = base.detach().clone()
    y = mix(operands, storage, inplace=True).y
    assert y.data_ptr() == storage.data_ptr()
    needed = (base * 1).exp()  # exp saves its output
    y = mix(operands, needed, inplace=True).y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saves_no_token_by_output_tensor_and_no_copy_of_a_parameter():
    T, I, _, E, k, r = shape = (64, 8, 128, 4, 2, 2)
    tensors, _ = make(shape)
    x, base, A, B, router = tensors
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=1.0, gates=route(x @ router.t(), k))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = mix(operands, base).y
    assert y.requires_grad
    assert sum(t is A or t is B for t in saved) == 2
    shapes = sorted(tuple(t.shape) for t in saved if t is not A and t is not B)
    assert shapes == sorted([(T, I), (E * r, T), (T, E)])


def test_parameters_may_be_released_between_forward_and_backward():
    """ZeRO-3 empties `param.data` after the forward pass and refills it before the backward pass."""
    tensors, dy = make((6, 5, 4, 3, 2, 2))
    expected, _ = make((6, 5, 4, 3, 2, 2))
    fast(expected, 2, 1.0, GateSettings("sqrt"))[0].backward(dy)
    y, _ = fast(tensors, 2, 1.0, GateSettings("sqrt"))
    whole = [t.data for t in tensors[2:4]]
    for parameter in tensors[2:4]:
        parameter.data = torch.empty(0, dtype=torch.float64)
    for parameter, data in zip(tensors[2:4], whole, strict=True):
        parameter.data = data.clone()
    y.backward(dy)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, expected, strict=True))


def test_mixed_dtypes_compute_in_the_base_outputs_dtype():
    tensors, dy = make((16, 8, 8, 4, 2, 2), torch.float32)
    x, base, A, B, router = tensors
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=1.0, gates=route(x @ router.t(), 2))
    y = mix(operands, base.to(torch.bfloat16)).y
    y.backward(dy.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in tensors} == {torch.float32}
    exact, _ = make((16, 8, 8, 4, 2, 2), torch.float32)
    fast(exact, 2, 1.0, GateSettings())[0].backward(dy)
    assert max_relative_error(A.grad, exact[2].grad) < TOLERANCE[torch.bfloat16]


def test_no_copy_of_a_frozen_factor_is_kept():
    """Who writes through `.data`, or into the buffer that a parameter is a view of, leaves no trace on it."""
    torch.manual_seed(0)
    flat = torch.randn(2 * 3 * 4)
    lora_A, lora_B = (torch.nn.Parameter(torch.randn(2, n, 4), requires_grad=False) for n in (3, 5))
    lora_A.data = flat.view(2, 3, 4)
    x, base, gates = torch.randn(6, 3), torch.zeros(6, 5), torch.full((6, 2), 0.5)

    def product() -> torch.Tensor:
        return mix(Operands(x=x, lora_A=lora_A, lora_B=lora_B, scaling=1.0, gates=gates), base).y

    before = product()
    flat.mul_(2)  # an optimizer's step
    torch.testing.assert_close(product(), 2 * before)
    lora_B.data.mul_(3)  # e.g. the reference model of TRL's SyncRefModelCallback
    torch.testing.assert_close(product(), 6 * before)
