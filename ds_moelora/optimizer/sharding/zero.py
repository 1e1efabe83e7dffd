"""Where DeepSpeed keeps the parameters it took from an optimizer: the one module that reads its private attributes.

DeepSpeed replaces `param_group["params"]` by flat partitions of its own and calls `optimizer.step()` as follows
(seen on the versions of `TESTED_VERSIONS`):

    stage 0, fp32             the parameters themselves; one call
    stage 0, fp16 / bf16      FP16_UnfusedOptimizer: fp32 master copies, same order and shape; one call
    stages 1 and 2            DeepSpeedZeroOptimizer: one flat fp32 partition per group; one call per group, during
                              which `optimizer.param_groups` holds that group alone
    stage 1, bf16 with fp32   BF16_Optimizer: the same partitions, one call for all groups
      gradient accumulation
    stage 3                   DeepSpeedZeroOptimizer_Stage3: one flat fp32 tensor per sub-group that holds this rank's
                              partition of every parameter; one call per sub-group

No import of DeepSpeed is needed: everything hangs on the parameters. What is read there is read through `_read`, whose
error names the installed and the tested versions; each class below says what it reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .placement import Placement

# 0.18.9 was tried: with torch 2.13 it cannot step at stages 1 and 2 on several CPU ranks (tests/support/versions.py).
TESTED_VERSIONS = "0.16.9, 0.17.6, 0.19.8"
GROUP_KEY = "group_index"  # an optimizer's param groups carry their number: DeepSpeed drops, slices and copies lists
ParamGroup = dict[str, Any]
Flat = tuple[torch.Tensor, torch.Tensor | None]  # local flat weights, and their gradient


class Storage(Protocol):
    """Where trained parameters lie. A parameter is named by its index in the list given to `find_storage`."""

    sharded: bool = True

    def placement(self, index: int) -> Placement:
        """Of parameter `index`; equal in every process but for its own part."""

    def units(self, param_groups: Sequence[ParamGroup]) -> set[Hashable]:
        """What the running call of `optimizer.step()` updates, given the groups it sees."""

    def held(self, unit: Any) -> Any:
        """The optimizer's own local tensor of a unit, under which it keeps its state."""

    def flat(self, unit: Any) -> Flat:
        """The local flat weights of a unit and their gradient."""
        partition = self.held(unit)
        return partition.detach(), partition.grad


def find_storage(params: list[Any], groups: list[int], known_groups: Mapping[int, ParamGroup]) -> Storage:
    """Finds out who holds the parameters now.

    Args:
        params: the optimizer's trained parameters, as the model has them.
        groups: number of each one's group.
        known_groups: the optimizer's groups by number, as DeepSpeed left them.

    Raises:
        ValueError: the optimizer holds something else than the parameters, and no known DeepSpeed optimizer put it
            there.
    """
    first = params[0]
    if is_stage_3(first):
        return ZeroStage3Storage(params)
    if hasattr(first, "_hp_mapping"):
        return ZeroPartitionStorage(params, groups, known_groups)
    held = {id(p) for group in known_groups.values() for p in group["params"]}
    if all(id(p) in held for p in params):
        return WholeStorage(params, params)
    return WholeStorage(params, _master_copies(params, groups, known_groups))


def is_stage_3(param: Any) -> bool:
    """True from when DeepSpeedZeroOptimizer_Stage3 took the parameter over."""
    return hasattr(param, "_z3_optimizer")


def is_partitioned(param: Any) -> bool:
    """True for a parameter that ZeRO-3 partitions, from `zero.Init` on."""
    return hasattr(param, "ds_id")


def whole_shape(param: Any) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 partitioned it."""
    return tuple(_read(param, "ds_shape") if is_partitioned(param) else param.shape)


def accumulation_boundary(engine: Any) -> bool | None:
    """Whether the last micro-batch completed a step, if accelerate counts them; None: the engine counts itself."""
    return getattr(engine, "_is_gradient_accumulation_boundary", None)


def configured_optimizer(engine: Any) -> str | None:
    """The optimizer's type in the engine's config; DeepSpeed's `optimizer_name()` is a client optimizer's, if any."""
    return getattr(getattr(engine, "_config", None), "optimizer_name", None)


def trained_groups(wrapper: Any) -> list[tuple[int, list[Any]]]:
    """(index of the optimizer's group, the model's parameters in it), as DeepSpeed's optimizer has grouped them.

    Raises:
        ValueError: its state is on NVMe.
    """
    if getattr(wrapper, "swap_optimizer", False) or getattr(wrapper, "params_in_nvme_and_cpu", False):
        raise ValueError(
            "elastic checkpoints cannot reach what is offloaded to NVMe: offload to the CPU, or use DeepSpeed's own "
            "checkpoints (engine.save_checkpoint)."
        )
    names = [name for name in ("bit16_groups", "bf16_groups", "fp16_groups") if hasattr(wrapper, name)]
    groups = _read(wrapper, names[0]) if names else [group["params"] for group in wrapper.param_groups]
    index_of = getattr(wrapper, "sub_group_to_group_id", {})  # stage 3's lists are sub-groups
    return [(index_of.get(i, i), list(group)) for i, group in enumerate(groups)]


def write_parameter(param: Any, values: Any, placement: Placement) -> None:
    """Sets a model's parameter, or this process's partition of it.

    Args:
        values: of the whole parameter, flat. placement: what this process owns of it.
    """
    if not is_partitioned(param):
        param.copy_(values.view(param.shape))
        return
    if getattr(param, "ds_secondary_tensor", None) is not None:
        raise ValueError("elastic checkpoints do not know zero_hpz_partition_size > 1: set it to 1.")
    own = values[placement.start : placement.stop]
    _read(param, "ds_tensor").view(-1)[: len(own)].copy_(own)
    if _read(param, "ds_status").name == "AVAILABLE":  # small ones are kept whole, too
        param.copy_(values.view(param.shape))


def _read(owner: Any, name: str) -> Any:
    """An attribute that DeepSpeed may rename in any release."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _unknown(f"DeepSpeed's {type(owner).__name__} has no {name!r}, as it had in tested versions") from error


def _unknown(what: str) -> ValueError:
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return ValueError(
        f"{what}. DeepSpeed here: {version}; tested: {TESTED_VERSIONS}. Use a tested version, or give the optimizer "
        "the parameters themselves."
    )


class WholeStorage(Storage):
    """Nothing is partitioned: the parameters, or full-precision copies of the same shapes. One unit each."""

    sharded = False

    def __init__(self, params: list[Any], held: list[Any]) -> None:
        self.numels = [p.numel() for p in params]
        self._held = held
        self._views: list[Any] = [None] * len(held)  # of weights, flat

    def placement(self, index: int) -> Placement:
        return Placement(numel=self.numels[index], unit=index, partition=max(self.numels[index], 1))

    def units(self, param_groups: Sequence[ParamGroup]) -> set[Hashable]:
        return set(range(len(self._held)))

    def held(self, unit: Any) -> Any:
        return self._held[unit]

    def flat(self, unit: Any) -> Flat:
        p = self._held[unit]
        if not p.is_contiguous():
            # Rows must be consecutive, and torch's fused step wants weight and gradient in the same order.
            p.data = p.data.contiguous()
        view, grad = self._views[unit], p.grad
        moved = view is None or not p.is_cpu or view.data_ptr() != p.data_ptr() or view.dtype != p.dtype
        if moved:  # `p.data` is another tensor now (FakeTensors cannot tell)
            view = self._views[unit] = p.detach().view(-1)
        if grad is not None:
            if grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of a {tuple(p.shape)} parameter is sparse ({grad.layout}); Riemannian "
                    "preconditioning needs dense gradients: construct the layer with sparse=False."
                )
            if not grad.is_contiguous():
                grad = p.grad = grad.contiguous()
            grad = grad.view(-1)
        return view, grad


def _master_copies(params: list[Any], groups: list[int], known_groups: Mapping[int, ParamGroup]) -> list[Any]:
    """FP16_UnfusedOptimizer: each group's params became full-precision copies, in the same order."""
    held = {index: list(group["params"]) for index, group in known_groups.items()}
    copies = []
    for param, group in zip(params, groups, strict=True):
        if not held[group] or held[group][0].shape != param.shape:
            raise _unknown(
                f"the optimizer no longer holds the parameters it was given (one of shape {tuple(param.shape)} is "
                "missing), and what replaced them is neither a ZeRO partition nor a full-precision copy"
            )
        copies.append(held[group].pop(0))
    return copies


class ZeroPartitionStorage(Storage):
    """ZeRO-1/2 and BF16_Optimizer: every group is one flat buffer, cut into equal partitions over its ranks.

    Reads `param._dp_group`. The model's parameters are views of the flat buffer of their whole group, so that
    `storage_offset()` tells a parameter's position to every rank, also to those that own nothing of it.
    `param._hp_mapping`, which tells it to owners alone, is wrong with `round_robin_gradients` (DeepSpeed 0.19.8 links
    it in the order before the reordering); only its presence is used, as the mark of these optimizers.
    """

    def __init__(self, params: list[Any], groups: list[int], known_groups: Mapping[int, ParamGroup]) -> None:
        self.params, self.groups, self.known_groups = params, groups, known_groups

    def placement(self, index: int) -> Placement:
        param, unit = self.params[index], self.groups[index]
        partition = self.held(unit).numel()
        group = _read(param, "_dp_group")
        process, world = dist.get_rank(group), dist.get_world_size(group)
        if param.untyped_storage().nbytes() < partition * world * param.element_size():
            raise _unknown(
                f"a parameter of shape {tuple(param.shape)} is not a view of its group's flat buffer of "
                f"{partition * world} elements"
            )
        position = int(param.storage_offset())
        return Placement(
            numel=param.numel(),
            unit=unit,
            position=position,
            partition=partition,
            local_offset=max(position - process * partition, 0),
            process=process,
            world=world,
            group=group,
        )

    def held(self, unit: Any) -> Any:
        params = self.known_groups[unit]["params"]
        if len(params) != 1:
            raise _unknown(f"parameter group {unit} holds {len(params)} tensors, where ZeRO keeps one flat partition")
        return params[0]

    def units(self, param_groups: Sequence[ParamGroup]) -> set[Hashable]:
        return {group[GROUP_KEY] for group in param_groups if group["params"]}


class ZeroStage3Storage(Storage):
    """ZeRO-3: every parameter is cut into equal partitions of its own; a sub-group's lie in one flat tensor.

    Reads `param._z3_optimizer` with `get_param_id(param)`, `grad_position[id] = [sub_group, offset, numel]`,
    `fp32_partitioned_groups_flat`, `offload_optimizer` and `partial_offload` (offload_optimizer.ratio of the config);
    and `param.ds_numel`, `param.ds_process_group`.
    """

    def __init__(self, params: list[Any]) -> None:
        self.params = params
        self.optimizer = _read(params[0], "_z3_optimizer")
        self.partitions = _read(self.optimizer, "fp32_partitioned_groups_flat")
        ratio = _read(self.optimizer, "partial_offload")
        if _read(self.optimizer, "offload_optimizer") and ratio != 1.0:
            raise ValueError(
                f"offload_optimizer.ratio is {ratio}: DeepSpeed then steps a part of the parameters with "
                "torch.optim.AdamW instead of this optimizer; set ratio to 1.0."
            )

    def placement(self, index: int) -> Placement:
        param = self.params[index]
        positions, key = _read(self.optimizer, "grad_position"), _read(self.optimizer, "get_param_id")(param)
        if key not in positions:
            raise _unknown(f"DeepSpeed's {type(self.optimizer).__name__} has no grad_position of a trained parameter")
        sub_group, offset, partition = positions[key]
        group = _read(param, "ds_process_group")
        return Placement(
            numel=_read(param, "ds_numel"),
            unit=sub_group,
            partition=partition,
            local_offset=offset,
            process=dist.get_rank(group),
            world=dist.get_world_size(group),
            group=group,
        )

    def units(self, param_groups: Sequence[ParamGroup]) -> set[Hashable]:
        stepped = {id(p) for group in param_groups for p in group["params"]}
        return {i for i, partition in enumerate(self.partitions) if id(partition) in stepped}

    def held(self, unit: Any) -> Any:
        return self.partitions[unit]
