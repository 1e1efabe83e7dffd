"""The kernels against the float64 formula; `tests.optimizer.interpreted` runs them in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_moelora.mixture import fused_losses, grouped_mm
from ds_moelora.mixture.fused import FUSED, route_at_once
from ds_moelora.mixture.grouped_mm import GROUPED_MM
from ds_moelora.mixture.mixture import mix
from ds_moelora.mixture.operands import Operands, RoutingRule
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.mixture.routing import chosen_by, route
from ds_moelora.pairs import GATE_SCALINGS, GateSettings
from ds_moelora.tuner.losses import AuxLosses, BatchLayout, batch_layout, router_losses

from .conftest import by_group

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # as in test_moe_lora_function
seen = 0


@given(
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6), st.integers(2, 9), st.integers(1, 9)),
    rank=st.sampled_from([1, 3, 4, 17, 33]),
    routing=st.sampled_from(["routed", "top_p", "given"]),
    gate=st.tuples(st.sampled_from(GATE_SCALINGS), st.booleans()),
    dtype=st.sampled_from(list(TOLERANCE)),
    shared_A=st.booleans(),
    products=st.sampled_from([FUSED, FUSED, GROUPED_MM]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def agree(sizes, rank, routing, gate, dtype, shared_A, products, seed) -> None:
    global seen
    (T, I, O, E, k), generator = sizes, torch.Generator().manual_seed(seed)
    k, grouped = min(k, E), products is GROUPED_MM
    routing, shared_A = ("routed" if grouped and routing == "top_p" else routing), shared_A and not grouped
    shapes = ((T, I), (E, I), (1 if shared_A else E, I, rank), (E, O, rank), (O, I), (T, O))
    *leaves, W, dy = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    x, router, A, B = [leaf.requires_grad_() for leaf in leaves]
    top_p = 0.6 if routing == "top_p" else None
    o = Operands(x, A, B, 1.3, rule=RoutingRule(k, top_p, 2.0), settings=GateSettings(*gate))
    if routing == "given":
        gates = route(x @ router.t() / 2, k)
        y = mix(o._replace(gates=gates), x @ W.t(), products=products).y
    else:
        y, _, gates = mix(o._replace(router=router), x.detach() @ W.t(), base_weight=W, inplace=True, products=products)
    y.backward(dy)
    z, other_router, other_A, other_B = wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference_layer(
        z, z @ W.double().t(), other_A, other_B, other_router, k, 1.3, *gate, chosen_by(gates.detach()), 2.0
    )
    expected.backward(dy.double())
    errors = [max_relative_error(y, expected)]
    errors += [max_relative_error(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True)]
    router_error = errors.pop(2)  # a difference of nearly equal terms
    assert max(errors) < TOLERANCE[dtype], errors
    assert router_error < 50 * TOLERANCE[dtype], router_error
    seen += 1


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 9), st.integers(1, 3)),
    coefs=st.sampled_from([(0.1, 0.0), (0.0, 0.1), (0.1, 0.1)]),
    layout=st.sampled_from(["rows", "grid", "mask", "bool mask", "packed"]),
    weights=st.sampled_from(["none", "sequence", "other"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
)
@settings(max_examples=16, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def losses_agree(sizes, coefs, layout, weights, dtype, seed) -> None:
    """The routers' losses and their gradient with the formula in float64; tiles and parts are small."""
    (S, N, E, k), generator = sizes, torch.Generator().manual_seed(seed)
    lead, mask, packed, S = (S, N), None, None, (1 if layout == "packed" else S)
    if layout.endswith("mask"):
        mask = torch.rand(S, N, generator=generator) < 0.6
        mask[0] = False  # a sequence without tokens
        mask = mask if layout == "bool mask" else mask.long()
    elif layout == "packed":  # the last token, if there are three, is in no sequence
        lead, bounds = (1, N), torch.tensor([0, N // 3, N - (N > 2)], dtype=torch.int32)
        kwargs = {"cu_seq_lens_q": bounds, "max_length_q": int(bounds.diff().max()), "input_ids": torch.zeros(1, N)}
        packed = batch_layout(kwargs, True).packed
    elif layout == "rows":
        lead = (S * N,)
    sequences = len(packed) if packed is not None else S * N if layout == "rows" else S
    of = {"none": None, "sequence": torch.rand(sequences, generator=generator), "other": torch.rand(7)}[weights]
    batch = BatchLayout((S, N) if layout == "packed" else None, mask, of, packed)
    wide = torch.randn(S * N, E + 3, generator=generator).mul(2).to(dtype)
    gates = route(wide[:, 3:], min(k, E))
    results = []
    for logits in (wide[:, 3:].requires_grad_(), wide[:, 3:].double().requires_grad_()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_losses, "covers", lambda logits: logits.dtype != torch.float64)
            patch.setattr(fused_losses, "TILE", 8)
            patch.setattr(fused_losses, "MOST_PARTS", 3)
            found = router_losses(logits, gates, AuxLosses(*coefs), lead, batch)
            kept = [loss for loss, coef in zip(found, coefs, strict=True) if coef]
            (gradient,) = torch.autograd.grad([3 * loss for loss in kept], logits)
        results.append((*found, gradient))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            actual, expected.to(actual.dtype), rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-5
        )


def routes_like_torch() -> None:
    """Ties, infinities, a NaN, the largest number of experts, and a chosen expert whose gate underflows."""
    logits = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for top_k, top_p in ((1, None), (5, None), (5, 0.02), (256, None)):
        assert torch.equal(chosen_by(route_at_once(logits, top_k, top_p)), chosen_by(route(logits, top_k, top_p)))
        torch.testing.assert_close(route_at_once(logits, top_k, top_p), route(logits, top_k, top_p))
    odd = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -1e4, -2e4, -torch.inf], [torch.nan, 0.0, 1.0, 2.0]])
    gates = route_at_once(odd, 2)
    assert chosen_by(gates).sum(1).tolist() == [2, 2, 2]
    assert gates[0].max() == 0.5
    assert chosen_by(gates)[1].tolist() == [True, True, False, False]
    assert gates[2].isnan().sum() == 2  # a broken token shows


def all_agree() -> int:
    """How many layers were compared."""
    grouped_mm.grouped_mm = by_group
    routes_like_torch()
    agree()
    losses_agree()
    return seen
