"""What the benchmarks count as sent, against the formulas of a ring and of DeepSpeed's ZeRO stages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.traffic import Traffic

from ..monitoring.test_monitoring import engine_of, train
from ..support.ranks import run_on_ranks


def counted() -> tuple[float, dict[str, int], float]:
    x, parts = torch.ones(8), torch.ones(16)
    with Traffic() as traffic:
        dist.all_reduce(x)
        dist.all_gather_into_tensor(parts, x)
        dist.reduce_scatter_tensor(output=x, input=parts)
        dist.all_to_all_single(parts, torch.ones(16))
        dist.broadcast(x, 0)
        dist.all_gather([torch.empty(8), torch.empty(8)], x)
    dist.all_reduce(x)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    with Traffic() as traffic_alone:
        dist.all_reduce(x, group=alone)
    return traffic.sent, dict(traffic.calls), traffic_alone.sent


@pytest.mark.dist
def test_bytes_are_those_of_a_ring() -> None:
    """Two processes: S bytes of an all-reduce, S / 2 of the others, where S is the whole buffer."""
    for sent, calls, alone in run_on_ranks(2, counted):
        assert sent == 4 * (8 + 16 / 2 + 16 / 2 + 16 / 2 + 8 / 2 + 16 / 2)
        assert set(calls.values()) == {1}
        assert len(calls) == 6
        assert alone == 0


def counted_engine(stage: int) -> tuple[float, int]:
    """Bytes that one step of an engine sends, and of all trained and all parameters."""
    engine = engine_of(stage)
    with Traffic() as traffic:
        for _ in train(engine, steps=1):
            pass
    sizes = [getattr(p, "ds_numel", p.numel()) * 4 for p in engine.module.parameters() if p.requires_grad or stage == 3]
    engine.destroy()
    return traffic.sent, sum(sizes)


@pytest.mark.dist
def test_bytes_of_deepspeeds_collectives() -> None:
    """Two processes. ZeRO-2: gradients are all-reduced (S) and weights gathered (S / 2), besides Gram matrices and
    norms. ZeRO-3: every weight is gathered at least once (S / 2; so few are kept for the backward pass)."""
    for sent, trained in run_on_ranks(2, counted_engine, stage=2):
        assert 1.5 * trained < sent < 1.7 * trained
    for sent, everything in run_on_ranks(2, counted_engine, stage=3):
        assert everything / 2 < sent < 2 * everything
