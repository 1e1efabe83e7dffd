"""The dense products with torch.compile between them: compiled, for any number of tokens, in a model, and equal."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from ds_moelora.mixture import compiled
from ds_moelora.mixture.compiled import COMPILED
from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.reference import max_relative_error
from ds_moelora.mixture.routed import routed_moe_lora
from ds_moelora.pairs import GateSettings

from ..support.adapter_support import adapted, assert_same, batch, train_step

I, O, E, k, r = 24, 20, 6, 2, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # bfloat16: fused, fewer intermediate results are rounded


def results(compute, tokens: int, dtype: torch.dtype, r: int = r) -> list[torch.Tensor]:
    """y and the gradients of x, router, A and B."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, I), (E, I), (E, I, r), (E, O, r)]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    base = torch.randn(tokens, O, generator=generator).to(dtype)
    y, logits, _ = routed_moe_lora(base, *leaves, 1.5, k, settings=GateSettings("sqrt"), compute=compute)
    (y.sum() + 0.1 * logits.float().square().sum()).backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_dense(dtype: torch.dtype) -> None:
    """The third number of tokens is not compiled for by itself; none at all are a case of their own."""
    counters.clear()
    for tokens in (7, 12, 33, 0):
        for mine, theirs in zip(results(COMPILED, tokens, dtype), results(DENSE, tokens, dtype), strict=True):
            assert mine.dtype == theirs.dtype
            assert max_relative_error(mine, theirs) < TOLERANCE[dtype]
    assert 2 <= counters["stats"]["unique_graphs"] <= 6  # forward and backward, each at most static, dynamic, empty


def test_many_kinds_of_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to compile the same code again after eight times; layers of other ranks do not count."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled._compiled.cache_clear()
    for rank, dtype, tokens in itertools.product((4, 8, 2, 1, 16, 3), TOLERANCE, (7, 33, 1, 0)):
        for mine, theirs in zip(*(results(c, tokens, dtype, rank) for c in (COMPILED, DENSE)), strict=True):
            assert max_relative_error(mine, theirs) < TOLERANCE[dtype]
    compiled._compiled.cache_clear()


def test_in_a_model() -> None:
    """Where the layer itself is hidden from an outer torch.compile, its products are compiled all the same."""
    counters.clear()
    loss, grads = train_step(adapted(), batch())
    assert counters["stats"]["unique_graphs"] == 0
    other_loss, others = train_step(adapted(expert_compute="compiled"), batch())
    assert counters["stats"]["unique_graphs"] >= 2
    torch.testing.assert_close(loss, other_loss)
    assert_same(others, grads, rtol=1e-4)
