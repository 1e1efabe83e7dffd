"""The step's Triton kernels without a GPU: interpreted, compiled for two generations of GPUs, and their launches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.step_cost import Shape, factors_of, places_of
from ds_moelora import GateRiemannianAdamW, GateRiemannianMuon
from ds_moelora.optimizer import base, kernels
from ds_moelora.optimizer.kernels.adamw import FusedAdamW
from ds_moelora.optimizer.sharding import exchange, transfer
from ds_moelora.optimizer.sharding.exchange import ShardedPreconditioner
from ds_moelora.pairs import LoraPair, tag_pair

from ..mixture.test_launches import Launches

pytest.importorskip("triton", reason="Triton is not installed: pip install 'ds_moelora[triton]'")

from benchmarks.kernel_resources import CAPABILITIES, step_resources


def test_kernels_in_the_interpreter_agree_with_float64() -> None:
    """Those of the layer, too, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.optimizer.interpreted"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search("12 layers agree.*6 optimizers agree", done.stdout, re.DOTALL), done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability: int) -> None:
    for row in step_resources((4, 64), capability):
        assert row.registers <= 255
        assert row.spilled == 0, row
        assert row.shared <= 48 * 1024, row


class PlannedOnTheHost(exchange.StepPlan):
    """A plan is integer arithmetic on the host, whose tensors must not be fake."""

    def __init__(self, *args: Any) -> None:
        with unset_fake_temporarily():
            super().__init__(*args)


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "StepPlan", PlannedOnTheHost)


def fake_pairs(layers: int, rank: int = 4) -> list[nn.Parameter]:
    """On a GPU that is not there; between the pairs, a parameter of none."""
    params = []
    for k in range(layers):
        A, B, router = (nn.Parameter(torch.empty(4, n, rank, device="cuda")) for n in (48, 32, 8))
        tag_pair(LoraPair(f"layer {k}", 4, rank), A, B)
        params += [A, B, router]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def launched(names: list[str]) -> list[str]:
    """Without what torch notes for its profiler, and questions for a device's name."""
    return [name for name in names if name != "device" and not name.startswith("_record_function")]


def test_at_most_12_launches_whatever_the_depth() -> None:
    """FakeTensors raise where the host needs a value, and where devices mix."""
    found = {}
    for layers in (2, 16):
        with FakeTensorMode():
            optimizer = GateRiemannianAdamW(fake_pairs(layers), lr=1e-3)
            optimizer.step()
            with Launches() as count:
                optimizer.step()
            assert optimizer._located.preconditioner.kernels.name == "triton"
        found[layers] = launched(count.names)
    assert found[2] == found[16]
    assert len(found[2]) <= 12, found[2]


LAYERS: list[Shape] = [(48, 33, 3, 4, False), (5, 3, 3, 4, False)]


def launches_of_a_shard(layers: int, stage: int) -> list[str]:
    """Of the second step on the flat partition of one of two processes."""
    factors = factors_of(LAYERS * layers)
    places = places_of(factors, 0, 2, stage)
    triton = kernels.load("triton")
    assert triton is not None
    with FakeTensorMode(), mock.patch.object(transfer, "dist"):
        size = max(place.local_offset + place.stop - place.start for place in places)
        partition = nn.Parameter(torch.empty(size, device="cuda"))
        partition.grad = torch.empty_like(partition)
        update, peer = FusedAdamW(lambda _: partition, triton), torch.optim.AdamW([partition], fused=True)
        step = ShardedPreconditioner(
            factors,
            places,
            lambda _: (partition.detach(), partition.grad),
            lambda grams, _, damping: triton.damped_inverse(grams, damping),
            lambda _: (1e-6,),
            kernels=triton,
        )
        for _ in range(2):
            with Launches() as count:
                update.begin(peer, {0})
                with update.finished(step({0}, update.state_of)):
                    pass
    return launched(count.names)


@pytest.mark.parametrize("stage", [2, 3])
def test_at_most_12_launches_of_a_shard(stage: int) -> None:
    """At stage 3 boundaries cut rows: gathering their pieces, sending and putting them back takes 6 launches more."""
    few, many = (launches_of_a_shard(layers, stage) for layers in (2, 16))
    assert len(few) == len(many)
    assert len(many) <= 12, many


def test_what_a_cuda_graph_cannot_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        params = fake_pairs(1)
        optimizer, spectral = GateRiemannianAdamW(params, lr=1e-3), GateRiemannianMuon(params, lr=1e-3)
        monkeypatch.setattr(base, "capturing", lambda: True)
        with pytest.raises(ValueError, match="GateRiemannianMuon: its eigendecomposition waits"):
            spectral.step()
        with pytest.raises(ValueError, match="take one step before the capture"):
            optimizer.step()
        monkeypatch.setattr(base, "capturing", lambda: False)
        optimizer.step()
        monkeypatch.setattr(base, "capturing", lambda: True)
        with pytest.raises(ValueError, match=r"number lr would stay.*torch\.tensor\(lr, device=\"cuda\"\)"):
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device="cuda")
        optimizer._refuse_capture()


def test_gradients_that_moved_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_moelora.optimizer.kernels import gpu

    monkeypatch.setattr(gpu, "capturing", lambda: True)
    with pytest.raises(ValueError, match=r"have moved.*zero_grad\(set_to_none=False\)"):
        gpu._addresses(torch.device("cpu"), [torch.zeros(3)])
