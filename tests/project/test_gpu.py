"""What needs a CUDA device: the hot path never waits for the host. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_gpu import tagged_factors
from benchmarks.layers import Size, contenders, training_step
from ds_moelora import GateRiemannianAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_synchronisation(dtype: torch.dtype) -> None:
    layer = contenders(Size(8, 2, 4, 64, 48, 32), dtype, "cuda", loop=False, computes=["dense"])["dense"]
    optimizer = GateRiemannianAdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(2, 16, 64, device="cuda", dtype=dtype, requires_grad=True)
    step = training_step(layer, x, torch.randn(2, 16, 48, device="cuda", dtype=dtype))
    step()
    optimizer.step()  # the first one makes its plans on the host
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in layer.parameters())


def test_step_in_a_cuda_graph() -> None:
    """With lr on the device; the step is static once its plan is made."""
    size = Size(4, 2, 4, 96, 64, 0)
    plain, captured = (tagged_factors(3, size, "cuda") for _ in range(2))
    rates = [1e-3, torch.tensor(1e-3, device="cuda")]
    optimizers = [GateRiemannianAdamW(p, lr=lr) for p, lr in zip((plain, captured), rates, strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    grads = [p.grad.clone() for p in plain]  # type: ignore[union-attr]
    with torch.cuda.stream(stream):
        optimizers[1].step()
        for p, grad in zip(captured, grads, strict=True):
            p.grad.copy_(grad)  # type: ignore[union-attr]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    optimizers[0].step()
    for _ in range(2):
        for params in (plain, captured):
            for p, grad in zip(params, grads, strict=True):
                p.grad.copy_(grad)  # type: ignore[union-attr]
        optimizers[0].step()
        graph.replay()
    for p, q in zip(plain, captured, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
