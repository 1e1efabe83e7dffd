"""FP16_Optimizer, which DeepSpeed takes at stage 0 with a fused Adam: one flat fp32 copy per group, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

from ds_moelora.checkpoint.elastic import check_state, gather_weights, restore_state, write_state
from ds_moelora.checkpoint.manifest import write_manifest
from ds_moelora.checkpoint.processes import NotFiniteError
from ds_moelora.checkpoint.trained import Run

from ..support.expert_parallel import adapted


def run_after(steps: int) -> Run:
    """Built by hand: the fused Adam that makes DeepSpeed choose it needs a GPU."""
    module = adapted().to(torch.bfloat16)
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    wrapper = FP16_Optimizer(optimizer, low_precision_dtype=torch.bfloat16, static_loss_scale=1.0, verbose=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        wrapper.step()
    return Run(module=module, wrapper=wrapper, optimizer=optimizer)


def test_they_are_saved_and_restored_to_the_bit(tmp_path: Path) -> None:
    trained, fresh = run_after(steps=2), run_after(steps=0)
    manifest, _ = write_state(trained, tmp_path)
    write_manifest(tmp_path, manifest)
    manifest, lines = check_state(fresh, tmp_path)
    assert lines == []
    restore_state(fresh, tmp_path, manifest)
    (copy,), (restored,) = trained.wrapper.fp32_groups_flat, fresh.wrapper.fp32_groups_flat
    used = sum(p.numel() for p in trained.module.parameters() if p.requires_grad)
    assert torch.equal(copy[:used], restored[:used])
    moments, again = trained.optimizer.state[copy], fresh.optimizer.state[restored]
    assert torch.equal(moments["exp_avg"][:used], again["exp_avg"][:used])
    assert moments["step"] == again["step"] == 3, "DeepSpeed does one at the start, to allocate"
    for expected, got in zip(trained.module.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("where", ["weights", "exp_avg"])
def test_what_is_not_finite_is_named(where: str, tmp_path: Path) -> None:
    run = run_after(steps=1)
    (copy,) = run.wrapper.fp32_groups_flat
    name, param = next((n, p) for n, p in run.module.named_parameters() if p.requires_grad and "lora_B" in n)
    flat = copy.detach() if where == "weights" else run.optimizer.state[copy]["exp_avg"]
    flat[param.storage_offset() + 1] = torch.inf
    with pytest.raises(NotFiniteError, match=rf"{name} is not finite \(.*{where}\)"):
        write_state(run, tmp_path)
    if where == "weights":
        with pytest.raises(NotFiniteError, match=name):
            gather_weights(run)
