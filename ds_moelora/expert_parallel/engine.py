"""What DeepSpeed's engine must be told, or kept from, before it trains mixtures with `ep_size > 1`; and its groups.

The one module that uses DeepSpeed's internals of expert parallelism, as `zero.py` is for its optimizers.

Installed by `ds_moelora.patches` when the first expert-parallel layer is built; models without one are never affected.
Seen on DeepSpeed 0.19.8:

- ZeRO-3 refuses native MoE layers with an AssertionError that names neither the setting nor the way out.
- At stage 0 in fp32 `clip_grad_norm_` takes each rank's norm over its own experts and averages the norms over the
  ranks: not the norm of the gradient, so that clipping would depend on ep_size. Replaced by the exact norm.
- At stage 0 in half precision the norm is each rank's own, without any exchange: ranks would clip the parameters that
  they share differently and drift apart. Refused.
- `configure_moe_param_groups` wants a list, and a "name" in each group, which neither transformers nor accelerate give.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups

from .nodes import explain_split

logger = logging.getLogger("ds_moelora")
TESTED_VERSIONS = "0.19.8"


# What is used of DeepSpeed's groups.
NEEDED = ("_create_expert_and_data_parallel", "_get_expert_parallel_group_dict", "_get_expert_data_parallel_group")


def check_deepspeed() -> None:
    """Looks for the functions of DeepSpeed's that expert parallelism calls.

    Raises:
        ValueError: one is missing; the message names it and the tested versions.
    """
    missing = [name for name in NEEDED if not hasattr(groups, name)]
    if missing:
        raise ValueError(
            f"expert parallelism needs {', '.join(missing)}, which this DeepSpeed ({metadata.version('deepspeed')}) "
            f"does not have; it was made for {TESTED_VERSIONS}. Use that version, or ep_size=1."
        )


def expert_group(name: str) -> dist.ProcessGroup | None:
    """The expert-parallel group of this rank called `name`; None before an engine has created it."""
    return groups._get_expert_parallel_group_dict().get(name)


def expert_data_group(name: str) -> dist.ProcessGroup:
    """The ranks that hold the same experts as this one."""
    return groups._get_expert_data_parallel_group(name)


def create_groups(ep_size: int, data_before_expert: bool) -> None:
    """Creates DeepSpeed's expert-parallel and expert-data-parallel groups, unless they are there."""
    name = f"ep_size_{ep_size}"
    if expert_group(name) is None:
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
        _look_at_nodes(expert_group(name), data_before_expert)


def _look_at_nodes(group: dist.ProcessGroup | None, data_before_expert: bool) -> None:
    """Warns, on rank 0, of groups that lie on several nodes without need."""
    assert group is not None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), dist.get_process_group_ranks(group)))
    members = sorted({tuple(ranks) for _, ranks in found})
    message = explain_split(members, [node for node, _ in found], data_before_expert)
    if message and dist.get_rank() == 0:
        logger.warning(message)


def _has_shards(model: torch.nn.Module) -> bool:
    from .shard import ShardedExperts

    return any(isinstance(module, ShardedExperts) for module in model.modules())


def check_before_configuring(configure: Any) -> Any:
    """`DeepSpeedEngine._configure_distributed_model` that refuses settings in which experts would be wrong."""

    def checked(self: Any, model: torch.nn.Module) -> Any:
        if _has_shards(model):
            _check_engine(self, model)
            _schedule_buckets(model)
        return configure(self, model)

    return checked


def _check_engine(engine: Any, model: torch.nn.Module) -> None:
    """Raises a ValueError, on every rank, for settings in which expert parallelism would be wrong."""
    if engine.zero_optimization_partition_weights():
        raise ValueError(
            "ep_size > 1 cannot be combined with ZeRO stage 3: stage 3 shards the experts (and everything else) over "
            "all ranks already, and DeepSpeed has no second sharding for them. Use ep_size=1, or ZeRO stage 1 or 2."
        )
    half = engine.fp16_enabled() or engine.bfloat16_enabled()
    if half and not engine.zero_optimization() and engine.gradient_clipping():
        raise ValueError(
            "ep_size > 1 with fp16 or bf16 and gradient clipping needs ZeRO stage 1 or 2: at stage 0 DeepSpeed clips "
            "by each rank's own norm, and the ranks would drift apart. Use stage 1, or gradient_clipping 0."
        )
    sizes: set[Any] = {m.ep_size for m in model.modules() if hasattr(m, "ep_size") and hasattr(m, "expert_group_name")}
    if len(sizes) > 1:
        raise ValueError(f"the model has layers with ep_size {sorted(sizes)}; use one ep_size for all adapters.")


def _schedule_buckets(model: torch.nn.Module) -> None:
    """Gives layers that are to be gathered together one schedule."""
    from .gather import Schedule
    from .shard import ShardedExperts

    schedules: dict[int, Schedule] = {}
    for module in model.modules():
        if isinstance(module, ShardedExperts) and module.spec.bucket_layers > 1:
            module.schedule = schedules.setdefault(module.spec.bucket_layers, Schedule(module.spec.bucket_layers))


def clip_exactly(clip: Any) -> Any:
    """`DeepSpeedEngine.clip_fp32_gradients` by the norm of the whole gradient."""

    def clip_fp32_gradients(self: Any) -> None:
        if not _has_shards(self.module):
            clip(self)
            return
        clip_by_whole_norm(self.module.parameters(), self.gradient_clipping())

    return clip_fp32_gradients


@torch.no_grad()
def clip_by_whole_norm(parameters: Iterable[Any], max_norm: float) -> torch.Tensor:
    """Clips replicated and expert gradients by the norm of all of them, every expert counted once.

    norm^2 = sum over replicated parameters |g|^2 + sum over the expert-parallel group of sum over local experts |g|^2

    One all-reduce of a number per group name. As DeepSpeed's and torch's: g *= min(1, max_norm / (norm + 1e-6)).
    """
    grads = [(p, p.grad) for p in parameters if p.grad is not None]
    device = grads[0][1].device
    total = torch.zeros((), device=device)
    by_group: dict[str, torch.Tensor] = {}
    for p, grad in grads:
        square = grad.detach().float().square().sum()
        if is_moe_param(p):
            by_group[p.group_name] = by_group.get(p.group_name, torch.zeros((), device=device)) + square
        else:
            total += square
    for name, square in sorted(by_group.items()):
        dist.all_reduce(square, group=expert_group(name))
        total += square
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in grads:
        grad.mul_(factor.to(grad.dtype))
    return norm


def name_groups(configure: Any) -> Any:
    """`configure_moe_param_groups` for any iterable, and for groups without a name."""

    def configure_moe_param_groups(model_parameters: Any) -> Any:
        params = list(model_parameters)
        if params and isinstance(params[0], dict):
            params = [{"name": f"group{i}", **group} for i, group in enumerate(params)]
        return configure(params)

    return configure_moe_param_groups
