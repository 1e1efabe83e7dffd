"""Gates, the load-balancing loss and the router z-loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.mixture.routing import chosen_by, route, sequence_balance_loss, sequence_z_loss


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gates_are_the_renormalised_top_k(num_tokens, num_experts, k, seed):
    k = min(k, num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates = route(logits, k)
    chosen = chosen_by(gates)
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
    gates = route(torch.zeros(2, 4, dtype=dtype), k)
    chosen = chosen_by(gates)
    assert gates.dtype == wide
    assert chosen.dtype == torch.bool


@given(
    logits=st.lists(st.lists(st.sampled_from([-1e30, -200, -1, 0, 1, 200, math.nan]), min_size=5, max_size=5)),
    k=st.integers(1, 5),
    top_p=st.sampled_from([None, 0.3, 0.99]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_gates_tell_what_was_chosen(logits, k, top_p, dtype):
    """Where the gate of a chosen expert underflows, and where a token is broken, too."""
    gates = route(torch.tensor(logits, dtype=dtype).reshape(-1, 5), k, top_p)
    chosen = chosen_by(gates)
    numbers = chosen.sum(-1)
    assert ((numbers == k) if top_p is None else (numbers >= 1) & (numbers <= k)).all()
    assert not gates[~chosen].any()


def test_one_of_one_expert_has_gate_1_and_no_gradient():
    logits = torch.randn(5, 1, requires_grad=True)
    gates = route(logits, 1)
    gates.sum().backward()
    assert torch.equal(gates, torch.ones(5, 1))
    assert torch.equal(logits.grad, torch.zeros(5, 1))


def nucleus(logits, k, p):
    """The experts of one token, one by one: the most probable first, until their probabilities reach p, at most k."""
    exponentials = [math.exp(z) for z in logits]
    probabilities = [e / sum(exponentials) for e in exponentials]
    chosen, mass = [], 0.0
    for i in sorted(range(len(logits)), key=lambda i: -probabilities[i]):
        if len(chosen) < k and (not chosen or mass < p):
            chosen.append(i)
            mass += probabilities[i]
    gates = [exponentials[i] if i in chosen else 0.0 for i in range(len(logits))]
    return [g / sum(gates) for g in gates], chosen


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 0.99), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_top_p_is_the_formula_token_by_token(num_tokens, num_experts, k, p, seed):
    k = min(k, num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gates = route(logits, k, p)
    chosen = chosen_by(gates)
    for t, row in enumerate(logits.tolist()):
        expected, experts = nucleus(row, k, p)
        assert chosen[t].nonzero().flatten().tolist() == sorted(experts)
        torch.testing.assert_close(gates[t], torch.tensor(expected, dtype=torch.float64))
    alike = route(logits.clone().requires_grad_(), k, p)
    assert not num_tokens or alike.requires_grad


def test_top_p_uses_one_expert_at_least_and_k_at_most():
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1e4, 0.0, -1e4, 0.0]])
    assert chosen_by(route(logits, 3, 0.9)).sum(-1).tolist() == [1, 3, 1]
    assert chosen_by(route(logits, 1, 0.999)).sum(-1).tolist() == [1, 1, 1]
    assert chosen_by(route(logits, 4, 1e-9)).sum(-1).tolist() == [1, 1, 1]
    broken = route(torch.full((1, 4), torch.nan), 2, 0.5)
    assert chosen_by(broken).any()
    assert broken.isnan().any()


def test_top_p_near_1_equals_top_k():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearly, always = route(logits, 3, 1 - 1e-12), route(logits, 3)
    assert torch.equal(chosen_by(nearly), chosen_by(always))
    torch.testing.assert_close(nearly, always)


def brute_force(logits, chosen, real):
    """E * sum_i f_i P_i for one sequence, as written in the paper."""
    tokens = [t for t in range(logits.shape[0]) if real[t]]
    num_experts, slots = logits.shape[1], sum(int(chosen[t].sum()) for t in tokens)
    total = 0.0
    for i in range(num_experts):
        f = sum(bool(chosen[t, i]) for t in tokens) / slots
        P = sum(logits[t].softmax(-1)[i].item() for t in tokens) / len(tokens)
        total += f * P
    return num_experts * total


def test_balance_loss_equals_a_hand_computed_example():
    """Two tokens, two experts, k = 1. Both tokens go to expert 1, with probabilities 3/4 and 2/3.

    f = (1, 0), P_1 = (3/4 + 2/3) / 2 = 17/24, so L = 2 * 17/24 = 17/12. With k = 2, f = (1/2, 1/2): L = 1. GOAT's
    normalisation (f_i = tokens routed to i / tokens, which sums to k) gives k times as much: 17/12 and 2.
    """
    logits = torch.tensor([[[3.0, 1.0], [2.0, 1.0]]]).log()
    for k, expected in ((1, 17 / 12), (2, 1.0)):
        chosen = chosen_by(route(logits[0], k))[None]
        loss = sequence_balance_loss(logits, chosen)
        torch.testing.assert_close(loss, torch.tensor([expected]))
        f = chosen.float().mean(1)
        torch.testing.assert_close(2 * (f * logits.softmax(-1).mean(1)).sum(-1), k * loss)


def test_z_loss_equals_a_hand_computed_example():
    """exp(z) adds up to 4 and to 3: the mean of (log 4)^2 and (log 3)^2."""
    logits = torch.tensor([[[3.0, 1.0], [2.0, 1.0]]]).log()
    torch.testing.assert_close(sequence_z_loss(logits), torch.tensor([(math.log(4) ** 2 + math.log(3) ** 2) / 2]))


@given(st.integers(0, 4), st.integers(0, 6), st.integers(1, 7), st.booleans(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_z_loss_is_the_formula_without_padding(num_sequences, length, num_experts, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_sequences, length, num_experts, generator=generator, dtype=torch.float64) * 5
    real = torch.randint(0, 2, (num_sequences, length), generator=generator) if padded else None
    expected = []
    for s in range(num_sequences):
        tokens = [t for t in range(length) if real is None or real[s, t]]
        squares = [math.log(sum(math.exp(z) for z in logits[s, t].tolist())) ** 2 for t in tokens]
        expected.append(sum(squares) / len(squares) if squares else 0.0)
    torch.testing.assert_close(sequence_z_loss(logits, real), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("top_p", [None, 0.6])
def test_balance_loss_is_the_formula_without_padding(top_p):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 5, dtype=torch.float64)
    chosen = chosen_by(route(logits.view(-1, 5), 2 if top_p is None else 4, top_p)).view(3, 7, 5)
    assert (top_p is None) == (chosen.sum(-1) == 2).all()
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
    losses = sequence_balance_loss(collapsed, chosen_by(route(collapsed.view(-1, E), k)).view(1, 6, E))
    torch.testing.assert_close(losses, torch.tensor([E / k]))


def test_empty_sequences_and_batches_have_loss_zero():
    logits, chosen = torch.randn(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    losses = sequence_balance_loss(logits, chosen, torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert losses[0] == 0
    assert losses[1] > 0
    assert sequence_balance_loss(logits[:, :0], chosen[:, :0]).tolist() == [0.0, 0.0]
    assert sequence_balance_loss(logits[:0], chosen[:0]).shape == (0,)
