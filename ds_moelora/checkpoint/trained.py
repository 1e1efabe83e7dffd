"""The trained parameters of a run: name and shape without sharding, and the part that this process has.

What an elastic checkpoint needs, whichever optimizer trains, under DeepSpeed or without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optimizer.sharding.placement import Placement
from ..optimizer.sharding.zero import (
    Storage,
    ZeroPartitionStorage,
    find_storage,
    trained_groups,
    whole_shape,
    write_parameter,
)
from .gather import Segment
from .processes import rank, world_size


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and by what.

    Args:
        module: the model. wrapper: DeepSpeed's optimizer, or the torch optimizer itself.
        optimizer: the torch optimizer.
        scheduler: of learning rates; None without one.
        device: where tensors of the process group live.
        engine: the DeepSpeed engine; None without DeepSpeed.
        scaler: torch's GradScaler, where no engine scales the loss.
    """

    module: torch.nn.Module
    wrapper: Any
    optimizer: Any
    scheduler: Any = None
    device: Any = "cpu"
    engine: Any = None
    scaler: Any = None

    @classmethod
    def of(cls, engine: Any, scheduler: Any = None) -> Run:
        """That of an engine; `scheduler`: one that the engine does not know."""
        return cls(
            module=engine.module,
            wrapper=engine.optimizer,
            optimizer=engine.basic_optimizer,
            scheduler=engine.lr_scheduler if scheduler is None else scheduler,
            device=engine.device,
            engine=engine,
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained parameter.

    Args:
        name: in the model, without sharding: the same in every topology.
        param: the model's parameter on this process.
        shape: of the whole; of all experts, where they are spread over processes.
        offset: in the whole, of the first element of this process's parameter.
        placement: of what this process owns, within its parameter.
        group: index of the optimizer's parameter group.
        gives: this process gives its part when the whole is gathered. Every element has exactly one process that does.
    """

    name: str
    param: Any
    shape: tuple[int, ...]
    offset: int
    placement: Placement
    group: int
    gives: bool

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return torch.Size(self.shape).numel()

    @property
    def length(self) -> int:
        """Elements that this process owns."""
        return self.placement.stop - self.placement.start

    @property
    def rows(self) -> slice:
        """The rows of the whole parameter's first dimension that this process's parameter has."""
        first, count = (n * self.shape[0] // max(self.numel, 1) for n in (self.offset, self.placement.numel))
        return slice(first, first + count)

    def local(self, flat: Tensor) -> Tensor:
        """This process's part in a flat tensor of its unit."""
        return flat.view(-1)[self.placement.local_offset : self.placement.local_offset + self.length]


class TrainedParameters(list[Trained]):
    """All of a run's, sorted by name; and the storage in which they lie.

    Raises:
        ValueError: an arrangement whose parts are not known (another DeepSpeed, NVMe, pipelines, hpZ).
    """

    def __init__(self, run: Run) -> None:
        self.optimizer: Any = run.optimizer
        grouped = [(p, i) for i, group in trained_groups(run.wrapper) for p in group if p.requires_grad]
        params, groups = [p for p, _ in grouped], [i for _, i in grouped]
        if not params:
            raise ValueError("the engine trains no parameter: there is nothing to checkpoint.")
        known = dict(enumerate(self.optimizer.param_groups))
        flat = hasattr(run.wrapper, "fp32_groups_flat") and hasattr(run.wrapper, "fp16_groups_flat")
        self.storage: Storage = FlatCopies(params, groups, known) if flat else find_storage(params, groups, known)
        names = _whole_names(run.module)
        for index, (param, group) in enumerate(grouped):
            if id(param) not in names:
                raise ValueError("the optimizer holds a parameter that the model does not name; rebuild the engine.")
            name, shape, offset = names[id(param)]
            self.append(
                Trained(
                    name=name,
                    param=param,
                    shape=shape,
                    offset=offset,
                    placement=self.storage.placement(index),
                    group=group,
                    gives=self.storage.sharded or _is_first_replica(param),
                )
            )
        self.sort(key=lambda trained: trained.name)

    def state(self, trained: Trained) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's tensors for a parameter's unit, and its numbers; empty before the first step.

        Raises:
            ValueError: a partition's state has another shape than the partition.
        """
        held = self.storage.held(trained.placement.unit)
        tensors, numbers = {}, {}
        for name, value in self.optimizer.state.get(held, {}).items():
            is_tensor = isinstance(value, Tensor)
            if not is_tensor or name == "step" or (value.numel() == 1 and held.numel() != 1):
                if value is not None:  # SGD without momentum has None
                    numbers[name] = {"value": value.item() if is_tensor else value, "tensor": is_tensor}
                continue
            if value.numel() != held.numel() and self.storage.sharded:
                raise ValueError(
                    f"{type(self.optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a partition of "
                    f"{held.numel()} elements, which cannot be saved by parameter. Use DeepSpeed's own "
                    "(engine.save_checkpoint)."
                )
            tensors[name] = value
        return tensors, numbers

    def segments(self, trained: Trained, states: bool = True) -> list[Segment]:
        """A parameter's weight and, with `states`, the optimizer's tensors for it."""
        unit = trained.placement.unit
        found = {"weight": self.storage.flat(unit)[0], **(self.state(trained)[0] if states else {})}
        segments = []
        for key, value in found.items():
            if value.numel() == self.storage.held(unit).numel():
                part, shape, start = trained.local(value), trained.shape, trained.offset + trained.placement.start
            else:  # Adafactor's rows and columns
                part, shape, start = value.reshape(-1), tuple(value.shape), 0
            local = part.detach() if trained.gives else None
            segments.append(Segment(trained.name, key, value.dtype, shape, start, local))
        return segments

    @torch.no_grad()
    def write(self, trained: Trained, values: Tensor) -> None:
        """Sets the model's parameter and the optimizer's copy of it.

        Args:
            values: flat, those of this process's whole parameter (not only of the part that it owns).
        """
        place = trained.placement
        trained.local(self.storage.flat(place.unit)[0]).copy_(values[place.start : place.stop])
        write_parameter(trained.param, values, place)


class FlatCopies(ZeroPartitionStorage):
    """FP16_Optimizer (stage 0 in half precision with a fused Adam): one flat fp32 copy per group, nothing partitioned.

    The model's parameters are views of the group's flat half-precision buffer, in the same order.
    """

    sharded = False

    def placement(self, index: int) -> Placement:
        param, unit = self.params[index], self.groups[index]
        position = int(param.storage_offset())
        return Placement(
            numel=param.numel(),
            unit=unit,
            position=position,
            partition=self.held(unit).numel(),
            local_offset=position,
        )


def check_ownership(parameters: TrainedParameters, device: Any) -> None:
    """Every element of every parameter must have exactly one process that gives it. A collective call.

    Raises:
        ValueError: naming the parameter; on every process.
    """
    given = torch.tensor([t.length if t.gives else 0 for t in parameters], device=device)
    if world_size() > 1:
        dist.all_reduce(given)
    for trained, count in zip(parameters, given.tolist(), strict=True):
        if count != trained.numel:
            raise ValueError(
                f"{trained.name} has {trained.numel} elements, but the processes together own {count}: this way of "
                "sharding is not known to elastic checkpoints. Use DeepSpeed's own (engine.save_checkpoint)."
            )


def trained_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every trained parameter, without sharding."""
    names = _whole_names(model)
    return {names[id(p)][0]: names[id(p)][1] for p in model.parameters() if p.requires_grad}


def topology(run: Run) -> dict[str, Any]:
    """What decides how a run's state lies on its processes, and which rows are read in which step."""
    shards = _sharded_experts(run.module)
    return {
        "world_size": world_size(),
        "zero_stage": run.engine.zero_optimization_stage() if run.engine is not None else 0,
        "ep_size": int(shards[0].topology()[0]) if shards else 1,
        "samples_per_step": run.engine.train_batch_size() if run.engine is not None else None,
    }


def _sharded_experts(model: torch.nn.Module) -> list[Any]:
    """Modules whose experts are spread over processes; without DeepSpeed there are none."""
    found = [m for m in model.modules() if hasattr(m, "first_expert") and hasattr(m, "topology")]
    if found:
        from ..expert_parallel.shard import ShardedExperts  # needs DeepSpeed, which need not be installed

        found = [m for m in found if isinstance(m, ShardedExperts)]
    return found


def _whole_names(model: torch.nn.Module) -> dict[int, tuple[str, tuple[int, ...], int]]:
    """id -> (name, shape, offset) of every parameter, as it would be without sharding."""
    names: dict[int, tuple[str, tuple[int, ...], int]] = {}
    sharded = {id(m) for m in _sharded_experts(model)}
    for module_name, module in model.named_modules():
        for own_name, param in module.named_parameters(recurse=False):
            shape = whole_shape(param) or (1,)
            prefix, offset = module_name, 0
            if id(module) in sharded:
                prefix = module_name.removesuffix(".shard")
                offset = module.first_expert * param[0].numel()
                shape = (module.num_experts, *shape[1:])
            names.setdefault(id(param), (f"{prefix}.{own_name}".lstrip("."), tuple(shape), offset))
    return names


def _is_first_replica(param: Any) -> bool:
    """Nothing is partitioned: of the processes that hold the same parameter, the first one gives it."""
    if getattr(param, "allreduce", True):
        return rank() == 0
    from ..expert_parallel.groups import expert_data_group

    return dist.get_rank(expert_data_group(param.group_name)) == 0
