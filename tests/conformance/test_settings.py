"""Every pair of settings that DeepSpeed's users combine: the optimizers mean the same thing in all of them.

fp32 runs are compared with the float64 whole-matrix reference. In half precision everybody's gradients are rounded, so
the yardstick there is what plain AdamW deviates from *its* reference in the same setting.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ..support.mixture import SHAPES, SharedStack, Stack
from ..support.pairwise import pairwise
from ..support.plain_lora import plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import (
    PLAIN,
    SHARDED,
    deviation,
    engine_config,
    loraplus_groups,
    one_group,
    run_engine,
    run_reference,
    scattered_groups,
)
from ..support.versions import wrong_gradients

pytestmark = pytest.mark.dist

MODELS: dict[str, Callable[[], nn.Module]] = {
    # All experts chosen: in half precision a rounded router logit may swap experts, which says nothing of optimizers.
    "mixture": functools.partial(Stack, SHAPES, top_k=3),
    "shared": functools.partial(SharedStack, SHAPES, top_k=3),
    "lora": plain_lora,
}
GROUPS = {"one": one_group, "loraplus": loraplus_groups, "scattered": scattered_groups}
SETTINGS: dict[str, list[Any]] = {
    "kind": SHARDED,
    "stage": [0, 1, 2, 3],
    "world": [1, 2, 3, 4],
    "precision": ["fp32", "bf16", "fp16"],
    "accumulate": [1, 4],
    "clip": [0.0, 0.3],
    "groups": list(GROUPS),
    "model": list(MODELS),
    "grad_accum_dtype": [None, "fp32"],
    "offload": [False, True],
    "overlap_comm": [False, True],
    "reduce_scatter": [False, True],
    "contiguous_gradients": [False, True],
    "round_robin_gradients": [False, True],
    "sub_group_size": [10**9, 40],
}
# fp32 after 10 steps against float64; what is seen stays below 5e-6 but for one draw of data (AdamW, "shared",
# "scattered", 4 processes): 1.5e-5, without shards (stage 0) as well; two other draws 9e-7 and 4.5e-6. So where a draw
# is above the tolerance, the median of three counts: a fault shows in all of them.
TOLERANCE = 1e-5
AT_MOST = 1e-4  # in any draw
# Half precision: our drift over plain AdamW's from its own reference. Both are noise: in 16 settings the ratio lay
# between 0.2 and 2.0. Muon makes the small directions of a gradient, which rounding has spoilt most, as long as the
# others: between 0.3 and 4.2 in 20 settings. SGD keeps the errors in a gradient's length that AdamW divides out,
# those of the clipping factor among them: up to 4.0 with clipping in fp16, and 3.7 there in one process without shards.
ALLOWANCE = {"GateRiemannianAdamW": 3.0, "GateRiemannianSGD": 6.0, "GateRiemannianMuon": 6.0}


def valid(case: dict[str, Any]) -> bool:
    """Settings that stand for themselves: what has no effect at a stage is left at one value there."""
    stage = case["stage"]
    if stage == 0 and (case["offload"] or case["overlap_comm"] or not case["contiguous_gradients"]):
        return False
    if stage != 3 and case["sub_group_size"] != 10**9:
        return False
    if stage in (0, 3) and (case["round_robin_gradients"] or not case["reduce_scatter"]):
        return False
    if case["grad_accum_dtype"] and case["precision"] == "fp16" and case["offload"]:
        return False  # DeepSpeed never recovers from an overflow there: test_deepspeed_limits.py
    return case["grad_accum_dtype"] is None or (case["precision"] != "fp32" and stage > 0)


def steps_of(case: dict[str, Any]) -> int:
    # In fp16 the first steps are skipped, and the few that remain of six are noisier: SGD came up to its bound.
    return 6 if case["accumulate"] == 4 and case["precision"] == "bf16" else 10


def cost(case: dict[str, Any]) -> float:
    """About proportional to the time that a case takes: micro-batches in all processes and in the reference."""
    runs = 1 if case["precision"] == "fp32" else 6
    return runs * steps_of(case) * (case["world"] * (2 * case["accumulate"] + 1) + 3)


def config_of(case: dict[str, Any], kind: str) -> dict[str, Any]:
    flags = ("overlap_comm", "reduce_scatter", "contiguous_gradients", "round_robin_gradients", "sub_group_size")
    zero = {flag: case[flag] for flag in flags}
    if case["offload"]:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = engine_config(case["stage"], kind, case["clip"], case["accumulate"], case["precision"], **zero)
    if case["grad_accum_dtype"]:
        config["data_types"] = {"grad_accum_dtype": case["grad_accum_dtype"]}
    return config


def both(
    case: dict[str, Any], kind: str, seed: int = 1, steps: int = 10
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The engine's results by rank, and the reference's."""
    shared = {"model": MODELS[case["model"]], "groups": GROUPS[case["groups"]], "seed": seed, "steps": steps}
    results = run_on_ranks(case["world"], run_engine, config=config_of(case, kind), **shared)
    reference = run_reference(
        kind,
        case["world"],
        accumulate=case["accumulate"],
        clip=case["clip"],
        precision=case["precision"],
        skipped=tuple(results[0]["skipped"]),
        **shared,
    )
    return results, reference


def distance(results: list[dict[str, Any]], reference: dict[str, Any]) -> float:
    """The largest relative deviation of any process's weights."""
    return max(deviation(result["weights"], reference["weights"]) for result in results)


def drift(case: dict[str, Any], kind: str) -> float:
    """Median over data of the distance to the reference, relative to the distance that training went."""
    found = []
    for seed in (1, 2, 3):
        results, reference = both(case, kind, seed, steps_of(case))
        weights, end, start = results[0]["weights"], reference["weights"], reference["start"]
        away = sum((weights[name].double() - w).square().sum() for name, w in end.items())
        found.append((away / sum((start[name] - w).square().sum() for name, w in end.items())).sqrt().item())
    return statistics.median(found)


def name_of(case: dict[str, Any]) -> str:
    def short(key: str, value: Any) -> str | None:
        if key in ("kind", "precision", "model", "groups"):
            return str(value).replace("GateRiemannian", "")
        if key in ("stage", "world"):
            return f"{key}{value}"
        if isinstance(value, bool):
            return key if value else None
        return f"{key}={value}" if value not in (None, 10**9, 0.0, 1) else None

    return " ".join(filter(None, (short(k, v) for k, v in case.items())))


CASES = list(pairwise(SETTINGS, valid, seed=38, cost=cost))  # one of the cheapest of 60 seeds


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_setting(case: dict[str, Any], report: Callable[[str, str], None]) -> None:
    started = time.monotonic()
    table = f"Conformance: {len(CASES)} settings, every pair of values at least once"
    fault = wrong_gradients(case)
    # In half precision plain AdamW, which has the fault too, is the yardstick anyway.
    if fault and case["precision"] == "fp32":
        ours, (plain, whole) = both(case, case["kind"])[0], both(case, "AdamW")
        report(table, f"DeepSpeed's gradients are wrong for plain AdamW too: {fault}  {name_of(case)}")
        assert deviation(plain[0]["weights"], whole["weights"]) > 0.1
        assert ours[0]["norms"][0] == plain[0]["norms"][0] != pytest.approx(whole["norms"][0], rel=1e-2)
        return
    if case["precision"] == "fp32":
        results, reference = both(case, case["kind"])
        assert {result["basic"] for result in results} == {case["kind"]}
        found, bound = distance(results, reference), TOLERANCE
        assert found < AT_MOST
        if found > bound:
            found = statistics.median([found, *(distance(*both(case, case["kind"], seed)) for seed in (2, 3))])
        if case["stage"] > 0:
            # Clipping and its log are about raw gradients: nothing of ours happens before them.
            norms = torch.tensor(results[0]["norms"], dtype=torch.float64)
            torch.testing.assert_close(norms, torch.tensor(reference["norms"]), rtol=1e-4, atol=1e-6, check_dtype=False)
    else:
        found, bound = drift(case, case["kind"]), ALLOWANCE[case["kind"]] * drift(case, PLAIN[case["kind"]])
    report(table, f"{found:.1e} (bound {bound:.1e}) {time.monotonic() - started:4.1f} s  {name_of(case)}")
    assert found < bound
