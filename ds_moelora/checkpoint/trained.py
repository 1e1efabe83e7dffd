"""The trained parameters of a DeepSpeed engine: name and shape without sharding, and the part that this rank has.

What an elastic checkpoint needs, whichever optimizer trains.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..expert_parallel.groups import expert_data_group
from ..expert_parallel.shard import ShardedExperts
from ..optimizer.sharding.placement import Placement
from ..optimizer.sharding.zero import Storage, find_storage, trained_groups, whole_shape, write_parameter


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained parameter.

    Args:
        name: in the model, without sharding: the same in every topology.
        param: the model's parameter on this rank.
        shape: of the whole; of all experts, where they are spread over ranks.
        offset: in the whole, of the first element of this rank's parameter.
        placement: of what this rank owns, within its parameter.
        group: index of the optimizer's parameter group.
        speaks: this rank gives its part when the whole is gathered. Every element has exactly one rank that does.
    """

    name: str
    param: Any
    shape: tuple[int, ...]
    offset: int
    placement: Placement
    group: int
    speaks: bool

    @property
    def start(self) -> int:
        """First element of the whole that this rank owns."""
        return self.offset + self.placement.start

    @property
    def length(self) -> int:
        return self.placement.stop - self.placement.start

    def local(self, flat: Tensor) -> Tensor:
        """This rank's part in a flat tensor of its unit."""
        return flat.view(-1)[self.placement.local_offset : self.placement.local_offset + self.length]


class TrainedParameters(list[Trained]):
    """All of an engine's, sorted by name; and the storage in which they lie.

    Raises:
        ValueError: an arrangement whose parts cannot be told (another DeepSpeed, NVMe, pipelines, hpZ).
    """

    def __init__(self, engine: Any) -> None:
        self.optimizer: Any = engine.basic_optimizer
        grouped = [(p, i) for i, group in trained_groups(engine.optimizer) for p in group if p.requires_grad]
        params, groups = [p for p, _ in grouped], [i for _, i in grouped]
        if not params:
            raise ValueError("the engine trains no parameter: there is nothing to checkpoint.")
        self.storage: Storage = find_storage(params, groups, dict(enumerate(self.optimizer.param_groups)))
        names = _whole_names(engine.module)
        found = []
        for index, (param, group) in enumerate(grouped):
            if id(param) not in names:
                raise ValueError("the optimizer holds a parameter that the model does not name; rebuild the engine.")
            name, shape, offset = names[id(param)]
            found.append(
                Trained(
                    name=name,
                    param=param,
                    shape=shape,
                    offset=offset,
                    placement=self.storage.placement(index),
                    group=group,
                    speaks=self.storage.sharded or _is_first_replica(param),
                )
            )
        super().__init__(sorted(found, key=lambda t: t.name))

    def state(self, unit: Hashable) -> dict[str, Any]:
        """The optimizer's state of a unit: tensors like its flat weights, and numbers. Empty before the first step."""
        return self.optimizer.state.get(self.storage.held(unit), {})

    @torch.no_grad()
    def write(self, trained: Trained, values: Tensor) -> None:
        """Sets the model's parameter and the optimizer's copy of it.

        Args:
            values: flat, those of this rank's whole parameter (not only of the part that it owns).
        """
        place = trained.placement
        trained.local(self.storage.flat(place.unit)[0]).copy_(values[place.start : place.stop])
        write_parameter(trained.param, values, place)


def _whole_names(model: torch.nn.Module) -> dict[int, tuple[str, tuple[int, ...], int]]:
    """id -> (name, shape, offset) of every parameter, as it would be without sharding."""
    names: dict[int, tuple[str, tuple[int, ...], int]] = {}
    for module_name, module in model.named_modules():
        for own_name, param in module.named_parameters(recurse=False):
            shape = whole_shape(param) or (1,)
            prefix, offset = module_name, 0
            if isinstance(module, ShardedExperts):
                prefix = module_name.removesuffix(".shard")
                offset = module.first_expert * param[0].numel()
                shape = (module.num_experts, *shape[1:])
            names.setdefault(id(param), (f"{prefix}.{own_name}".lstrip("."), shape, offset))
    return names


def _is_first_replica(param: Any) -> bool:
    """Nothing is partitioned: of the ranks that hold the same parameter, the first one gives it."""
    if getattr(param, "allreduce", True):
        return dist.get_rank() == 0
    return dist.get_rank(expert_data_group(param.group_name)) == 0


def topology(engine: Any) -> dict[str, Any]:
    """What decides whether DeepSpeed's own files of a checkpoint fit another run."""
    shards = [m for m in engine.module.modules() if isinstance(m, ShardedExperts)]
    ep_size, distance = shards[0].topology().tolist()[:2] if shards else (1, 1)
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "ep_size": ep_size,
        "expert_ranks_apart": distance,
        "wrapper": type(engine.optimizer).__name__,
    }
