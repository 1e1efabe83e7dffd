"""What experts have in common: one A for all of them (HydraLoRA), and an expert that every token uses (DeepSeekMoE)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_moelora import GateRiemannianSGD, MoELoRAConfig, tag_lora_pairs
from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.grouped import GROUPED
from ds_moelora.mixture.mixture import mix
from ds_moelora.mixture.operands import Operands
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by, route
from ds_moelora.optimizer.reference import damped_inverse
from ds_moelora.pairs import GATE_SCALINGS, GateSettings, tag_of

from ..support.adapter_support import Net, wrap


def experts_of(model: nn.Module):
    return model.base_model.model.lin.experts("default")


@given(
    shape=st.tuples(st.integers(0, 9), *[st.integers(1, 7)] * 3, st.integers(1, 7), st.integers(1, 4)),
    gate_scaling=st.sampled_from(GATE_SCALINGS),
    scale_input_grad=st.booleans(),
    grouped=st.booleans(),
    inplace=st.booleans(),
    top_p=st.sampled_from([None, 0.6]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_one_common_a_has_the_gradients_of_the_per_expert_formula(
    shape, gate_scaling, scale_input_grad, grouped, inplace, top_p, seed
):
    """float64 against autograd of the formula with `detach`, expert by expert; odd shapes, no tokens, top-p too."""
    T, I, O, E, k, r = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = [draw(T, I), draw(T, O), draw(1, I, r), draw(E, O, r), draw(E, I)]
    twins = [t.detach().clone().requires_grad_() for t in tensors]
    dy, gate = draw(T, O).detach(), GateSettings(gate_scaling, scale_input_grad)
    x, base, A, B, router = tensors
    gates = route(x @ router.t(), min(k, E), top_p)
    chosen = chosen_by(gates)
    operands = Operands(x=x, lora_A=A, lora_B=B, scaling=1.7, gates=gates, settings=gate)
    y = mix(operands, base * 1, inplace=inplace, products=GROUPED if grouped else DENSE).y
    y.backward(dy)
    expected = reference_layer(*(twins[i] for i in (0, 1, 2, 3, 4)), k, 1.7, gate_scaling, scale_input_grad, chosen)
    expected.backward(dy)
    assert max_relative_error(y, expected) < 1e-12
    for name, actual, reference in zip(["x", "base", "A", "B", "router"], tensors, twins, strict=True):
        # Two nearly equal experts make the router's gradient a small difference; one expert's gate is constant.
        bound = 1e-12 if name != "router" else 1e-10 if E > 1 else torch.inf
        assert max_relative_error(actual.grad, reference.grad) < bound, name


@pytest.mark.parametrize("lead", [(2, 3), (0,)])
@pytest.mark.parametrize(("shared_A", "num_experts"), [(False, 4), (True, 3), (False, 1)])
def test_shared_expert_is_always_on(lead, shared_A, num_experts):
    """y = mixture + s B A x, with exact gradients; the base output may be overwritten or not (a black box keeps it)."""
    for base in (nn.Linear(6, 5), Conv1D(5, 6)):
        model = wrap(base.double(), num_experts=num_experts, top_k=1, shared_expert=True, shared_A=shared_A)
        e = experts_of(model)
        x = torch.randn(*lead, 6, dtype=torch.float64, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        factors = [e.lora_A, e.lora_B, e.router.weight, e.shared.lora_A, e.shared.lora_B]
        twins = [p.detach().clone().requires_grad_() for p in factors]
        flat = z.reshape(-1, 6)
        expected = reference_layer(flat, base(flat), *twins[:3], 1, e.scaling)
        expected = (expected + e.scaling * flat @ twins[3][0] @ twins[4][0].t()).view(*lead, 5)
        y = model(x)
        assert max_relative_error(y, expected) < 1e-12
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy)
        for actual, reference in zip([x, *factors], [z, *twins], strict=True):
            assert max_relative_error(actual.grad, reference.grad) < 1e-12


def test_starts_at_the_base_model_and_lists_its_parameters(capsys):
    model = wrap(nn.Linear(6, 5), shared_expert=True, shared_A=True, init_lora_weights=True)
    x = torch.randn(4, 6)
    assert torch.equal(model(x), model.base_model.model.lin.base_layer(x))
    shapes = {n.rpartition(".default.")[2]: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert shapes == {
        "lora_A": (1, 6, 2),
        "lora_B": (4, 5, 2),
        "router.weight": (4, 6),
        "shared.lora_A": (1, 6, 2),
        "shared.lora_B": (1, 5, 2),
    }
    assert not torch.equal(experts_of(model).lora_A, experts_of(model).shared.lora_A)
    model.print_trainable_parameters()
    assert "trainable params: 98 " in capsys.readouterr().out


@pytest.mark.parametrize("base", [nn.Linear(6, 5), Conv1D(5, 6)])
def test_one_expert_and_a_shared_one_merge_exactly(base):
    weight = base.weight.detach().clone()
    model = wrap(base, num_experts=1, top_k=1, shared_expert=True, shared_A=True)
    x = torch.randn(7, 6)
    before = model(x)
    assert not torch.allclose(before, base(x), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    model.unmerge_adapter()
    torch.testing.assert_close(base.weight, weight)
    torch.testing.assert_close(model.merge_and_unload()(x), before)


def test_tags():
    """A shared A and all B_i are one pair of one expert; the shared expert is a pair of its own."""
    model = wrap(nn.Linear(6, 5), shared_expert=True, shared_A=True)
    assert tag_lora_pairs(model.base_model.model) == 2
    e = experts_of(model)
    pairs = [[tag_of(p)[0] for p in (m.lora_A, m.lora_B)] for m in (e, e.shared)]
    assert pairs[0][0] is pairs[0][1]
    assert pairs[1][0] is pairs[1][1]
    assert [(p.name, p.num_experts, p.rank, p.gate is None) for p, _ in pairs] == [
        ("lin", 1, 2, False),
        ("lin.shared", 1, 2, True),
    ]


@pytest.mark.parametrize("gate_scaling", GATE_SCALINGS)
def test_the_step_on_a_common_a_is_that_of_one_lora_of_the_stacked_matrix(gate_scaling):
    """One SGD step without damping, written out: dA = (sum_i B_i^T B_i)^-1 gradA, dB_i = gradB_i (A A^T)^-1."""
    base = nn.Linear(6, 5).double()
    model, twin = (wrap(base, shared_A=True, shared_expert=True) for _ in range(2))
    optimizer = GateRiemannianSGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, damping=0.0, gate_scaling=gate_scaling
    )
    x = torch.randn(9, 6, dtype=torch.float64)
    for m in (model, twin):
        experts_of(m).pair.gate.gate_scaling = gate_scaling
        m(x).square().sum().backward()
    optimizer.step()
    e, old = experts_of(model), experts_of(twin)
    for new_pair, pair in ((e, old), (e.shared, old.shared)):
        A, grad_A = pair.lora_A[0].t(), pair.lora_A.grad[0].t()  # (r, in)
        gram_B = sum(B.t() @ B for B in pair.lora_B)
        expected_A = A - 0.1 * damped_inverse(gram_B, 0.0) @ grad_A
        torch.testing.assert_close(new_pair.lora_A[0].t(), expected_A, rtol=1e-9, atol=1e-9)
        for new_B, B, grad_B in zip(new_pair.lora_B, pair.lora_B, pair.lora_B.grad, strict=True):
            expected_B = B - 0.1 * grad_B @ damped_inverse(A @ A.t(), 0.0)
            torch.testing.assert_close(new_B, expected_B, rtol=1e-9, atol=1e-9)


def test_in_half_precision():
    """bf16 model, float32 adapter, with and without autocast: the dtypes that a run without these options has."""
    for shared_A, autocast in itertools.product((False, True), (False, True)):
        fields = {"target_modules": ["lin"], "shared_expert": True, "shared_A": shared_A}
        model = get_peft_model(Net(nn.Linear(16, 12).bfloat16()), MoELoRAConfig(**fields))
        x = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = model(x)
        y.sum().backward()
        e = experts_of(model)
        assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
        assert e.lora_A.grad.dtype == e.shared.lora_B.grad.dtype == torch.float32
