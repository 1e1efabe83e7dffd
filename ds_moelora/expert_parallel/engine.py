"""What DeepSpeed's engine must be told, or kept from, before it trains mixtures with `ep_size > 1`.

Wrappers, original -> replacement, which `ds_moelora.patches` installs when the first expert-parallel layer is built;
models without one are never affected. Seen on DeepSpeed 0.19.8:

- ZeRO-3 refuses native MoE layers with an AssertionError that names neither the setting nor the way out.
- At stage 0 in fp32 `clip_grad_norm_` takes each rank's norm over its own experts and averages the norms over the
  ranks: not the norm of the gradient, so that clipping would depend on ep_size. Replaced by the exact norm.
- At stage 0 in half precision the norm is each rank's own, without any exchange: ranks would clip the parameters that
  they share differently and drift apart. Refused.
- `configure_moe_param_groups` wants a list, and a "name" in each group, which neither transformers nor accelerate give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param

from .gather import Gathers
from .groups import expert_parallel_group
from .shard import ShardedExperts


def _has_shards(model: torch.nn.Module) -> bool:
    return any(isinstance(module, ShardedExperts) for module in model.modules())


def check_before_configuring(configure: Any) -> Any:
    """`DeepSpeedEngine._configure_distributed_model` that refuses settings in which experts would be wrong."""

    def checked(self: Any, model: torch.nn.Module) -> Any:
        if _has_shards(model):
            _check_engine(self, model)
            _share_gathers(model)
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


def _share_gathers(model: torch.nn.Module) -> None:
    """Lets the layers of a model be gathered together."""
    gathers = Gathers()
    for module in model.modules():
        if isinstance(module, ShardedExperts):
            module.gathers = gathers
    gathers.follow(model)


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
        dist.all_reduce(square, group=expert_parallel_group(name))
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
