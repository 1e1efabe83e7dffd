"""Settings that DeepSpeed itself cannot run, each with its error. Plain AdamW fails in the same way.

When one of these tests fails, DeepSpeed has mended something: move the setting into `test_settings.py`.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ..support.mixture import SHAPES, Stack
from ..support.ranks import run_on_ranks
from ..support.training import engine_config, one_group, run_engine

pytestmark = pytest.mark.dist

BOTH = ["AdamW", "GateRiemannianAdamW"]


@pytest.mark.parametrize("kind", BOTH)
def test_fp16_offload_with_fp32_accumulation_never_recovers_from_an_overflow(kind: str) -> None:
    config = engine_config(2, kind, precision="fp16", offload_optimizer={"device": "cpu"})
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    assert all(run_on_ranks(2, run_engine, config=config)[0]["skipped"])
    del config["data_types"]
    assert not all(run_on_ranks(2, run_engine, config=config)[0]["skipped"])


@pytest.mark.parametrize("kind", BOTH)
def test_nvme_offload_needs_an_op_that_does_not_build_here(kind: str, tmp_path: object) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        pytest.fail("async_io builds on this machine: NVMe offload can be tested in test_settings.py")
    config = engine_config(3, kind, offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path)})
    with pytest.raises(AssertionError, match="Unable to JIT load the async_io op"):
        run_on_ranks(2, run_engine, config=config)


def wrong_fragments(round_robin: bool) -> int:
    """On every rank: how many parameters DeepSpeed maps to fp32 values that are not theirs."""
    import deepspeed

    import ds_moelora  # noqa: F401

    model = Stack(SHAPES)
    config = engine_config(2, "AdamW", round_robin_gradients=round_robin)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=one_group(model), config=config)
    wrong = 0
    for p in model.parameters():
        if p.requires_grad:
            wrong += not deepspeed.utils.safe_get_full_fp32_param(p).reshape(p.shape).equal(p.detach())
    dist.barrier()
    engine.destroy()
    return wrong


def test_hp_mapping_is_wrong_with_round_robin_gradients() -> None:
    """Why `parallel.zero` does not read it (and why `safe_get_full_fp32_param` cannot be trusted there)."""
    assert run_on_ranks(2, wrong_fragments, round_robin=False) == [0, 0]
    assert all(wrong > 0 for wrong in run_on_ranks(2, wrong_fragments, round_robin=True))
