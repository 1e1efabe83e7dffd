"""The step's Triton kernels without a GPU: interpreted, compiled for two generations of GPUs, and their launches."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step_cost import Shape, factors_of, places_of
from ds_moelora import GateRiemannianAdamW, GateRiemannianMuon, GateRiemannianSGD
from ds_moelora.optimizer import base, kernels
from ds_moelora.optimizer.sharding import transfer
from ds_moelora.optimizer.sharding.exchange import ShardedPreconditioner
from ds_moelora.pairs import LoraPair, tag_pair

from ..mixture.test_launches import Launches

pytest.importorskip("triton", reason="Triton is not installed: pip install 'ds_moelora[triton]'")

from benchmarks.kernel_resources import CAPABILITIES, step_resources


def test_kernels_in_the_interpreter_agree_with_float64() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.optimizer.interpreted"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "6 optimizers agree" in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability: int) -> None:
    for row in step_resources((4, 64), capability):
        assert row.registers <= 255
        assert row.spilled == 0, row
        assert row.shared <= 48 * 1024, row


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


@pytest.mark.parametrize("make", [GateRiemannianAdamW, GateRiemannianSGD])
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_at_most_12_launches_whatever_the_depth(make: Any, lr: str) -> None:
    """FakeTensors raise where the host needs a value, and where devices mix."""
    found = {}
    for layers in (2, 16):
        with FakeTensorMode():
            rate = torch.tensor(1e-3, device="cuda") if lr == "tensor" else 1e-3
            optimizer = make(fake_pairs(layers), lr=rate)
            optimizer.step()
            with Launches() as count:
                optimizer.step()
            assert optimizer._located.preconditioner.kernels.name == "triton"
        found[layers] = count.names
    assert found[2] == found[16]
    assert len(found[2]) <= 12, found[2]


LAYERS: list[Shape] = [(48, 33, 3, 4, False)]


@pytest.mark.parametrize("stage", [2, 3])
def test_launches_of_a_shard(stage: int) -> None:
    """One flat partition of two; boundaries cut rows."""
    found = {}
    for layers in (2, 16):
        factors = factors_of(LAYERS * layers)
        places = places_of(factors, 0, 2, stage)
        assert any(place.cut_rows(4) for place in places)
        with FakeTensorMode(), mock.patch.object(transfer, "dist"):
            size = max(place.local_offset + place.stop - place.start for place in places)
            weight = nn.Parameter(torch.empty(size, device="cuda"))
            weight.grad = torch.empty(size, device="cuda")
            taught = kernels.load("triton")
            update = base_update(weight, taught)

            def flat(_: Any, weight: nn.Parameter = weight) -> tuple[Tensor, Tensor | None]:
                return weight.detach(), weight.grad

            def matrices(grams: Tensor, _: Any, damping: Any) -> Tensor:
                return taught.damped_inverse(grams, damping)

            step = ShardedPreconditioner(factors, places, flat, matrices, lambda i: (1e-6,), kernels=taught)
            peer = torch.optim.AdamW([weight], fused=True)
            names = []
            for _ in range(2):
                with Launches() as count:
                    update.begin(peer, {0})
                    with update.finished(step({0}, update.state_of)):
                        pass
                names = count.names
        found[layers] = names
    assert len(found[16]) == len(found[2]), found
    assert len(found[16]) <= 12, found[16]


def base_update(weight: nn.Parameter, taught: Any) -> Any:
    from ds_moelora.optimizer.kernels.adamw import FusedAdamW

    return FusedAdamW(lambda _: weight, taught)


def captured(optimizer: Any, steps: int = 1) -> None:
    with FakeTensorMode():
        pass
    with mock.patch.object(base, "capturing", return_value=True):
        optimizer.step()


def test_what_a_cuda_graph_cannot_capture_is_refused() -> None:
    with FakeTensorMode():
        params = fake_pairs(1)
        numbered = GateRiemannianAdamW(params, lr=1e-3)
        on_device = GateRiemannianAdamW(params, lr=torch.tensor(1e-3, device="cuda"))
        spectral = GateRiemannianMuon(params, lr=1e-3)
        with pytest.raises(ValueError, match="take one step before the capture"):
            captured(on_device)
        for optimizer in (numbered, on_device):
            optimizer.step()
        with pytest.raises(ValueError, match=r"number lr would stay.*torch\.tensor\(lr, device=\"cuda\"\)"):
            captured(numbered)
        with pytest.raises(ValueError, match="eigendecomposition waits"):
            captured(spectral)
        captured(on_device)
