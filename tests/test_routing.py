"""Gates and the load-balancing loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.core.routing import route, sequence_balance_loss


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gates_are_the_renormalised_top_k(num_tokens, num_experts, k, seed):
    k = min(k, num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates, chosen = route(logits, k)
    full = logits.softmax(-1)
    kept = full * chosen
    torch.testing.assert_close(gates, kept / kept.sum(-1, keepdim=True))
    assert (chosen.sum(-1) == k).all()
    assert (gates[~chosen] == 0).all()
    smallest_kept = full.masked_fill(~chosen, 2).amin(-1)
    assert (full.masked_fill(chosen, -1).amax(-1) <= smallest_kept).all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("k", [1, 4])
def test_gates_are_computed_in_float32_or_wider(dtype, wide, k):
    gates, chosen = route(torch.zeros(2, 4, dtype=dtype), k)
    assert gates.dtype == wide
    assert chosen.dtype == torch.bool


def test_one_of_one_expert_has_gate_1_and_no_gradient():
    logits = torch.randn(5, 1, requires_grad=True)
    gates, _ = route(logits, 1)
    gates.sum().backward()
    assert torch.equal(gates, torch.ones(5, 1))
    assert torch.equal(logits.grad, torch.zeros(5, 1))


def brute_force(logits, chosen, real):
    """E * sum_i f_i P_i for one sequence, as written in the paper."""
    tokens = [t for t in range(logits.shape[0]) if real[t]]
    num_experts, k = logits.shape[1], int(chosen[0].sum())
    total = 0.0
    for i in range(num_experts):
        f = sum(bool(chosen[t, i]) for t in tokens) / (k * len(tokens))
        P = sum(logits[t].softmax(-1)[i].item() for t in tokens) / len(tokens)
        total += f * P
    return num_experts * total


def test_balance_loss_is_the_formula_without_padding():
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 5, dtype=torch.float64)
    chosen = route(logits.view(-1, 5), 2).chosen.view(3, 7, 5)
    real = torch.ones(3, 7)
    real[0, 4:] = 0
    real[2, :3] = 0
    losses = sequence_balance_loss(logits, chosen, real)
    expected = [brute_force(logits[i], chosen[i], real[i]) for i in range(3)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    cut = sequence_balance_loss(logits[:1, :4], chosen[:1, :4])
    torch.testing.assert_close(losses[:1], cut)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_even_use_gives_1_and_collapse_gives_experts_over_k(k):
    E = 4
    chosen = torch.zeros(1, E, E, dtype=torch.bool)
    for token in range(E):
        chosen[0, token, [(token + j) % E for j in range(k)]] = True
    torch.testing.assert_close(sequence_balance_loss(torch.zeros(1, E, E), chosen), torch.ones(1))
    collapsed = torch.full((1, 6, E), -100.0)
    collapsed[..., :k] = 0
    losses = sequence_balance_loss(collapsed, route(collapsed.view(-1, E), k).chosen.view(1, 6, E))
    torch.testing.assert_close(losses, torch.tensor([E / k]))


def test_empty_sequences_and_batches_have_loss_zero():
    logits, chosen = torch.randn(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    losses = sequence_balance_loss(logits, chosen, torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert losses[0] == 0
    assert losses[1] > 0
    assert sequence_balance_loss(logits[:, :0], chosen[:, :0]).tolist() == [0.0, 0.0]
    assert sequence_balance_loss(logits[:0], chosen[:0]).shape == (0,)
