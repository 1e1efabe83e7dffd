"""`python -m tests.optimizer.interpreted` with TRITON_INTERPRET=1: all Triton kernels against float64."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.step_cost import Shape
from ds_moelora import GateRiemannianAdamW, GateRiemannianMuon, GateRiemannianSGD
from ds_moelora.mixture.reference import max_relative_error
from ds_moelora.optimizer.kernels.gpu import TritonKernels
from ds_moelora.optimizer.kernels.rows import AdamWState, RowBlock, RowBlocks, extent_table
from ds_moelora.optimizer.preconditioner import RELATIVE_DAMPING, damped_inverse

from ..mixture import interpreted as layer
from ..support.mixture import Stack, batches
from ..support.plain_lora import plain_lora
from ..support.training import OPTIMIZERS, deviation, loraplus_groups, one_group
from .test_transfer import preconditioned

KERNELS = TritonKernels()
QUICK = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@given(
    rank=st.sampled_from([1, 2, 3, 4, 8, 16, 20]),
    shapes=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 70), st.sampled_from(["ours", "PEFT's A", "PEFT's stacked B"])),
        min_size=1,
        max_size=3,
    ),
    adamw=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, **QUICK)
def rows_agree(rank: int, shapes: list[tuple[int, int, str]], adamw: bool, seed: int) -> None:
    torch.manual_seed(seed)
    blocks = [
        RowBlock(unit, 0, e, n, rank, kind == "PEFT's A", kind == "PEFT's stacked B")
        for unit, (e, n, kind) in enumerate(shapes)
    ]
    weights, grads = ([torch.randn(e * n * rank) for e, n, _ in shapes] for _ in range(2))

    def views(flats: list[Tensor]) -> list[Tensor]:
        return [b.view(t) for t, b in zip(flats, blocks, strict=True)]

    count = sum(e for e, *_ in shapes)
    order = torch.randperm(count)
    rows, matrix = RowBlocks(rank), iter(order.tolist())
    for block in blocks:
        rows.add(block, [next(matrix) for _ in range(block.experts)])
    grams = torch.zeros(count, rank, rank)
    KERNELS.add_grams_(grams, rows, [None, *weights[1:]])
    exact = [view.double().mT @ view.double() for view in views(weights)]
    exact[0] *= 0
    torch.testing.assert_close(grams[order].double(), torch.cat(exact), rtol=1e-5, atol=1e-4)

    matrices = torch.randn(count, rank, rank)
    chosen = matrices[order].double().split([e for e, *_ in shapes])
    products = [view.double() @ own for view, own in zip(views(grads), chosen, strict=True)]
    if not adamw:
        KERNELS.precondition_(matrices, rows, grads)
        for view, product in zip(views(grads), products, strict=True):
            torch.testing.assert_close(view.double(), product, rtol=1e-5, atol=1e-5)
        return
    rates = (0.01, 0.9, 0.999, 1e-8, 0.1)
    states = [AdamWState(w, torch.rand_like(w), torch.rand_like(w), torch.tensor(float(seed)), rates) for w in weights]
    peers = [nn.Parameter(view.double()) for view in views(weights)]
    peer = torch.optim.AdamW(peers, lr=0.01, weight_decay=0.1)
    for p, product, state, block in zip(peers, products, states, blocks, strict=True):
        p.grad = product
        first, second = (t.as_strided(p.shape, block.strides).double() for t in (state.exp_avg, state.exp_avg_sq))
        peer.state[p] = {"step": state.step.clone(), "exp_avg": first, "exp_avg_sq": second}
    peer.step()
    KERNELS.precondition_(matrices, rows, grads, states)
    for view, p in zip(views(weights), peers, strict=True):
        torch.testing.assert_close(view.double(), p.detach(), rtol=1e-5, atol=2e-5)


@given(
    rank=st.sampled_from([1, 2, 3, 4, 8, 16]),
    distinct=st.integers(1, 4),
    scale=st.integers(-12, 12),
    damping=st.sampled_from([0.0, 1e-6, 1.0]),
    each=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, **QUICK)
def inverses_are_sound(rank: int, distinct: int, scale: int, damping: float, each: bool, seed: int) -> None:
    """Within the bounds of tests/optimizer/test_preconditioner.py where G is singular, else near float64."""
    torch.manual_seed(seed)
    rows = torch.randn(2, 40, min(distinct, rank)) @ torch.randn(min(distinct, rank), rank) * 10.0**scale
    grams = rows.mT @ rows
    inverse = KERNELS.damped_inverse(grams, torch.full((2,), damping) if each else damping).double()
    trace = grams.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    d = (RELATIVE_DAMPING * trace).clamp_min(max(damping, torch.finfo(torch.float32).tiny))
    eigenvalues = torch.linalg.eigvalsh(inverse)
    assert (eigenvalues[:, -1] <= 16 / d).all()
    assert (eigenvalues[:, 0] >= 0.9 / (trace + d) - 1e-5 * eigenvalues[:, -1]).all()
    if distinct >= rank and damping == 1.0 and scale <= 0:
        assert max_relative_error(inverse, damped_inverse(grams.double(), damping)) < 1e-3


def not_finite_stays_local() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        G = torch.eye(4).repeat(3, 1, 1)
        G[1, 2, 1] = G[1, 1, 2] = value
        inverse = KERNELS.damped_inverse(G, 1e-6)
        assert inverse[1].isnan().all()
        torch.testing.assert_close(inverse[::2], torch.eye(4).repeat(2, 1, 1))


def extents_agree() -> None:
    """Elements in no row: AdamW without matrices."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50))
    p.grad = torch.randn(50)
    before = p.detach().clone()
    state = AdamWState(before, torch.zeros(50), torch.zeros(50), torch.tensor(0.0), (0.1, 0.9, 0.999, 1e-8, 0.0))
    start = before.clone()
    KERNELS.step_extents_(extent_table([[(3, 20), (30, 50)]], p.device), [p.grad], [state])
    torch.optim.AdamW([p], lr=0.1, weight_decay=0.0).step()
    stepped = torch.zeros(50, dtype=torch.bool)
    stepped[3:20] = stepped[30:] = True
    torch.testing.assert_close(before[stepped], p.detach()[stepped])
    assert torch.equal(before[~stepped], start[~stepped])


class OneAtATime(TritonKernels):
    """Processes are threads here, and the interpreter knows one."""

    lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.endswith("_") or name.startswith("_"):
            return found

        def locked(*args: Any) -> None:
            with OneAtATime.lock:
                found(*args)

        return locked


def processes_agree() -> None:
    """Boundaries cut rows, experts and PEFT's interleaved stacks: by either collective, as in one process."""
    shapes: list[Shape] = [(5, 7, 3, 3, False), (3, 2, 2, 2, True), (20, 9, 1, 4, False)]
    whole = preconditioned(shapes, 1, 3, False, None)
    for world in (2, 3):
        for direct in (True, False):
            with mock.patch.object(OneAtATime, "move_", autospec=True, side_effect=TritonKernels.move_) as moves:
                sharded = preconditioned(shapes, world, 3, False, direct, OneAtATime())
            assert moves.call_count >= 4 * world
            for ours, expected in zip(sharded, whole, strict=True):
                torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def optimizers_agree() -> int:
    """Three steps of every optimizer, groups and layouts against torch's way; ranks 2 to 4."""
    kinds = {c.__name__: c for c in (GateRiemannianAdamW, GateRiemannianSGD, GateRiemannianMuon)}
    count = 0
    for kind, make in kinds.items():
        for model_of, groups in ((Stack, loraplus_groups), (plain_lora, one_group)):
            found = []
            for kernels in ("torch", "triton"):
                model = model_of([(7, 5, 3, 4), (5, 7, 2, 3)]) if model_of is Stack else model_of(r=4)
                optimizer = make(groups(model), **OPTIMIZERS[kind], kernels=kernels)
                for micro in batches(3, 1, 1):
                    optimizer.zero_grad()
                    model(*micro[0][0]).backward()
                    optimizer.step()
                found.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
            error = deviation(found[1], {name: p.double() for name, p in found[0].items()})
            assert error < 1e-5, (kind, model_of, error)
            assert optimizer._located.preconditioner.kernels.name == "triton"
            count += 1
    return count


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, of infinities
    print(f"{layer.all_agree()} layers agree")
    rows_agree()
    inverses_are_sound()
    not_finite_stays_local()
    extents_agree()
    processes_agree()
    print(f"{optimizers_agree()} optimizers agree")
