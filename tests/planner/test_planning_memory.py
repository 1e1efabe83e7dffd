"""The planner's bytes: by hand, against real engines and real modules, and how they move with the topology."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

import ds_moelora
from ds_moelora.planner.memory import block_activations, memory_per_gpu, trainable
from ds_moelora.planner.model import describe_model
from ds_moelora.planner.workload import Choice, Workload
from tests.support.planning import NET, engine_bytes
from tests.support.ranks import run_on_ranks

TWO = Workload(num_experts=4, rank=3, gpus=2, micro_batch=1, sequence_length=6)
# P_e = 4 * 3 * (7 + 5 + 5 + 11) = 336, P_r = 4 * (7 + 5) = 48, P_b = 142; bf16; AdamW keeps 8 bytes beside the master.
BY_HAND = {
    (0, 1): (284, 768, 768, 1536, 3072, 1536),
    (0, 2): (284, 432, 432, 864, 1728, 864),
    (1, 1): (284, 768, 768, 768, 1536, 768),
    (1, 2): (284, 432, 432, 768, 1536, 768),
    (2, 1): (284, 768, 384, 768, 1536, 768),
    (2, 2): (284, 432, 384, 768, 1536, 768),
    (3, 1): (142, 384, 384, 768, 1536, 768),
}
ITEMS = (
    "base weights",
    "experts and routers",
    "gradients",
    "fp32 master copy",
    "optimizer states",
    "fp32 gradients",
)


def choice(stage: int, ep_size: int, dispatch: str = "weights") -> Choice:
    return Choice(stage=stage, ep_size=ep_size, dispatch=dispatch if ep_size > 1 else "")


@pytest.mark.parametrize(("stage", "ep_size"), BY_HAND)
def test_bytes_by_hand(stage: int, ep_size: int) -> None:
    memory = memory_per_gpu(NET, TWO, choice(stage, ep_size))
    assert tuple(memory.item(name) for name in ITEMS) == BY_HAND[stage, ep_size]


def test_other_optimizers_and_precisions_by_hand() -> None:
    def items(**fields: Any) -> tuple[float, ...]:
        return tuple(memory_per_gpu(NET, replace(TWO, **fields), Choice(stage=0)).item(name) for name in ITEMS)

    assert items(optimizer="sgd") == (284, 768, 768, 1536, 0, 1536)
    assert items(optimizer="sgd-momentum") == (284, 768, 768, 1536, 1536, 1536)
    # Without ZeRO, fp32 weights are their own master copy.
    assert items(dtype="fp32") == (568, 1536, 1536, 0, 3072, 0)
    assert items(base_bytes=0.5) == (71, 768, 768, 1536, 3072, 1536)


def test_riemannian_step_by_hand() -> None:
    # 8 times 4 bytes of 2 layers x 2 Grams x E r^2, and the largest factor, 11 x 3 elements for each of E experts.
    assert memory_per_gpu(NET, TWO, choice(0, 1)).item("Riemannian step") == 8 * 4 * 2 * 2 * 4 * 9 + 4 * 132
    assert memory_per_gpu(NET, TWO, choice(2, 2)).item("Riemannian step") == 8 * 4 * 2 * 2 * 2 * 9 + 4 * 66
    # Of the second pair the first GPU has two experts of A: their Gram matrices, and those of B that they want.
    assert memory_per_gpu(NET, TWO, choice(2, 1)).item("Riemannian step") == 8 * 4 * (8 + 2 + 2) * 9 + 4 * 132
    assert memory_per_gpu(NET, replace(TWO, riemannian=False), choice(2, 2)).item("Riemannian step") == 0


def test_total_takes_the_larger_phase() -> None:
    memory = memory_per_gpu(NET, TWO, choice(2, 1))
    assert memory.total == memory.of("always") + max(memory.of("backward"), memory.of("step"))
    assert sum(item.bytes for item in memory.items) == pytest.approx(
        sum(map(memory.of, ("always", "backward", "step")))
    )


@pytest.mark.dist
def test_real_engines_hold_as_much(report: Callable[[str, str], None]) -> None:
    """DeepSpeed pads every partition to a few elements: up to 8 of 4 bytes for each of two parameter groups."""
    for stage, ep_size in [(0, 2), (1, 1), (2, 2), (3, 1)]:
        planned = memory_per_gpu(NET, TWO, choice(stage, ep_size))
        for rank, found in enumerate(run_on_ranks(2, engine_bytes, stage=stage, ep_size=ep_size)):
            for name, measured in found.items():
                padding = 2 * 8 * 4 * (2 if name == "optimizer states" else 1)
                assert planned.item(name) <= measured <= planned.item(name) + padding, (rank, stage, ep_size, name)
            line = ", ".join(f"{name} {found[name]} ({planned.item(name):.0f})" for name in found)
            report("bytes of a real engine (planned)", f"rank {rank}, stage {stage}, ep_size {ep_size}: {line}")


def tiny_llama(layers: int) -> Any:
    return transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
    )


def adapt(config: Any, work: Workload, **fields: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    adapter = ds_moelora.MoELoRAConfig(
        task_type="CAUSAL_LM",
        r=work.rank,
        num_experts=work.num_experts,
        top_k=work.top_k,
        expert_compute=work.expert_compute,
        **fields,
    )
    return get_peft_model(model, adapter, autocast_adapter_dtype=False)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*\.1\..*_proj"])
def test_parameters_are_those_of_a_real_model(targets: Any) -> None:
    config, work = tiny_llama(2), Workload(num_experts=6, rank=3, gpus=1)
    model, shape = adapt(config, work, target_modules=targets), describe_model(config, targets)
    count = trainable(shape, work, Choice(stage=0))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert count.experts + count.routers == sum(n for n, trains in sizes if trains)
    assert shape.base_parameters == sum(n for n, trains in sizes if not trains)


def saved_by_autograd(layers: int, work: Workload) -> int:
    """Bytes of distinct storages, other than parameters', that a forward pass keeps for the backward pass."""
    model = adapt(tiny_llama(layers), work, target_modules="all-linear").train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps addresses from being used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (work.micro_batch, work.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(
    ("num_experts", "rank", "compute"), [(8, 4, "dense"), (64, 16, "dense"), (256, 4, "dense"), (64, 16, "grouped")]
)
def test_activations_of_a_real_block(
    num_experts: int, rank: int, compute: str, report: Callable[[str, str], None]
) -> None:
    """What one block more keeps: the formula rounds up, by less than 6%."""
    work = Workload(
        num_experts=num_experts, rank=rank, gpus=1, micro_batch=2, sequence_length=64, expert_compute=compute
    )
    measured = saved_by_autograd(2, work) - saved_by_autograd(1, work)
    planned = block_activations(describe_model(tiny_llama(2)), work, Choice(stage=0))
    report("activations of a block", f"E={num_experts} r={rank} {compute}: measured {measured}, planned {planned:.0f}")
    assert measured <= planned <= 1.06 * measured


nodes = st.sampled_from([1, 2, 4, 8])


@st.composite
def topologies(draw: Any) -> tuple[Workload, Choice]:
    stage = draw(st.integers(0, 3))
    ep_size = draw(nodes) if stage < 3 else 1
    work = Workload(
        num_experts=8 * draw(st.integers(1, 4)),
        rank=draw(st.integers(1, 8)),
        gpus=8 * draw(st.integers(1, 4)),
        sequence_length=draw(st.integers(1, 64)),
        dtype=draw(st.sampled_from(["bf16", "fp32"])),
        optimizer=draw(st.sampled_from(["adamw", "sgd", "sgd-momentum"])),
        checkpointing=draw(st.booleans()),
        expert_compute=draw(st.sampled_from(["dense", "grouped"])),
    )
    return work, choice(stage, ep_size, draw(st.sampled_from(["weights", "tokens"])))


@given(topologies(), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_more_gpus_never_need_more_memory(topology: tuple[Workload, Choice], times: int) -> None:
    work, way = topology
    larger = replace(work, gpus=times * work.gpus)
    assert memory_per_gpu(NET, larger, way).total <= memory_per_gpu(NET, work, way).total * (1 + 1e-12)


@given(topologies())
@settings(max_examples=60, deadline=None)
def test_sharding_never_needs_more_memory(topology: tuple[Workload, Choice]) -> None:
    """Weights, gradients and states: a higher stage and a larger ep_size take at most as much."""
    work, way = topology

    def held(**fields: Any) -> float:
        memory = memory_per_gpu(NET, work, replace(way, **fields))
        return sum(memory.item(name) for name in ITEMS)

    assert held(ep_size=1, dispatch="") >= held() * (1 - 1e-12)
    # In fp32, stage 1 makes a master copy that stage 0 does not need.
    first = 1 if work.dtype == "fp32" else 0
    stages = [held(stage=stage) for stage in range(first, 3 if way.ep_size > 1 else 4)]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(stages))
