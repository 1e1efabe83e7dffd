"""Settings that DeepSpeed itself cannot run, each with its error. Plain AdamW fails in the same way.

What differs between versions is said in `support/versions.py`, and expected here of each version: nothing is skipped.
When one of these tests fails, DeepSpeed has mended something: move the setting into `test_settings.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch.distributed as dist

from ..support.mixture import SHAPES, Stack
from ..support.plain_lora import plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import engine_config, one_group, run_engine
from ..support.versions import GATHER_ERROR, GATHER_FAILS, OVERFLOW_STAYS, STAGE_3_ERROR, STAGE_3_LOSES_WRAPPED_MODULES

pytestmark = pytest.mark.dist

BOTH = ["AdamW", "GateRiemannianAdamW"]


@pytest.mark.parametrize("kind", BOTH)
def test_fp16_offload_with_fp32_accumulation_never_recovers_from_an_overflow(kind: str) -> None:
    config = engine_config(2, kind, precision="fp16", offload_optimizer={"device": "cpu"})
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    if GATHER_FAILS:
        with pytest.raises(AssertionError, match=GATHER_ERROR):
            run_on_ranks(2, run_engine, config=config)
        return
    assert all(run_on_ranks(2, run_engine, config=config)[0]["skipped"]) == OVERFLOW_STAYS
    del config["data_types"]
    assert not all(run_on_ranks(2, run_engine, config=config)[0]["skipped"])


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("supported", [True, False])
def test_fp16_where_the_accelerator_knows_it_and_where_not(kind: str, supported: bool) -> None:
    """DeepSpeed's CPU accelerator knows fp16 on CPUs with AVX-512-FP16 alone (not on AMD's)."""
    run = functools.partial(run_on_ranks, 2, run_engine, config=engine_config(1, kind, precision="fp16"), steps=4)
    if supported and not GATHER_FAILS:
        skipped = run(fp16=True)[0]["skipped"]
        assert skipped[0]  # the loss scale of 2**18 overflows, and is halved until it does not
        assert not skipped[-1]
    else:
        with pytest.raises(AssertionError, match=GATHER_ERROR if supported else "Type fp16 is not supported"):
            run(fp16=supported)


def own_answer(config: dict[str, Any]) -> tuple[bool, str]:
    """On every rank: what the accelerator of this machine says of fp16, and what becomes of an engine."""
    from deepspeed.accelerator import get_accelerator

    try:
        run_engine(config, steps=1, fp16=None)
    except ValueError as error:
        return bool(get_accelerator().is_fp16_supported()), str(error)
    return bool(get_accelerator().is_fp16_supported()), "trained"


def test_fp16_on_this_machine() -> None:
    for supported, outcome in run_on_ranks(1, own_answer, config=engine_config(1, "AdamW", precision="fp16")):
        assert outcome == ("trained" if supported else "Type fp16 is not supported on your device.")


def test_nvme_offload_needs_an_op_that_does_not_build_here(tmp_path: object) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        pytest.skip("async_io builds on this machine; NVMe offload is not tested")
    config = engine_config(3, "AdamW", offload_optimizer={"device": "nvme", "nvme_path": str(tmp_path)})
    with pytest.raises(AssertionError, match="Unable to JIT load the async_io op"):
        run_on_ranks(1, run_engine, config=config)


@pytest.mark.parametrize("kind", BOTH)
def test_modules_to_save_at_stage_3(kind: str) -> None:
    model = functools.partial(plain_lora, modules_to_save=["head"])
    run = functools.partial(run_on_ranks, 2, run_engine, config=engine_config(3, kind), model=model)
    if STAGE_3_LOSES_WRAPPED_MODULES:
        with pytest.raises(AssertionError, match=STAGE_3_ERROR):
            run()
    else:
        run()


@pytest.mark.parametrize(("kind", "stage"), [("AdamW", 1), ("GateRiemannianAdamW", 2)])
def test_two_ranks_at_stages_1_and_2(kind: str, stage: int) -> None:
    run = functools.partial(run_on_ranks, 2, run_engine, config=engine_config(stage, kind))
    if GATHER_FAILS:
        with pytest.raises(AssertionError, match=GATHER_ERROR):
            run()
    else:
        run()


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
    """Why `optimizer.sharding.zero` does not read it (and why `safe_get_full_fp32_param` cannot be trusted there)."""
    assert run_on_ranks(2, wrong_fragments, round_robin=False) == [0, 0]
    assert all(wrong > 0 for wrong in run_on_ranks(2, wrong_fragments, round_robin=True))
