"""What needs a CUDA device: the hot path never waits for the host. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers import Size, contenders, training_step
from ds_moelora import GateRiemannianAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_host_synchronisation(dtype: torch.dtype) -> None:
    layer = contenders(Size(8, 2, 4, 64, 48, 32), dtype, "cuda", loop=False)["dense"]
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
