"""One rank's experts of one layer, as DeepSpeed's engine wants to see them. Imported only where `ep_size > 1`.

The module is a subclass of `deepspeed.moe.layer.MoE` because that is how the engine finds out that a model has experts:
it then creates the groups (`set_deepspeed_parallelism`), makes parameter groups for expert parameters (those with
`allreduce = False` and a `group_name`), shards their optimizer state over the expert-data-parallel group, and saves
every expert in a file of its own. Nothing else of DeepSpeed's class is used: its dispatch drops tokens and wants
in = out.

Experts are stacked in two parameters; `state_dict()` has them one by one under the names that DeepSpeed's checkpoints
expect, `deepspeed_moe.experts.deepspeed_experts.<local number>.lora_A`, and `load_state_dict` stacks them again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from ..mixture.choice import choose_products
from ..mixture.dense import DENSE
from ..mixture.mixture import mix
from ..mixture.operands import Operands, Products
from .dispatch import choose_dispatch
from .exchange import Exchanged
from .gather import Gathered, Gathers
from .groups import check_deepspeed, create_groups, expert_parallel_group
from .spec import FACTORS, INITIAL_FACTORS, ShardSpec, check_ep_size

EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
TOPOLOGY = "topology"


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, also before torch.distributed is open.

    Raises:
        ValueError: nobody has said yet.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise ValueError(
            "ep_size > 1 must know this process's rank: call deepspeed.init_distributed() before get_peft_model, and "
            "start the script with the deepspeed launcher or torchrun."
        ) from None


class ShardedExperts(MoE):
    """E / ep_size experts of a layer: `lora_A` (L, I, R) and `lora_B` (L, O, R), on DeepSpeed's expert-parallel group.

    Before `deepspeed.initialize` it takes the group to be ep_size consecutive ranks, DeepSpeed's default. Where the
    engine finds otherwise (`use_data_before_expert_parallel_`), the experts change places then.

    Raises:
        ValueError: `ep_size` does not divide the world size, or the rank is not known.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, spec: ShardSpec) -> None:
        nn.Module.__init__(self)  # not MoE's, which builds DeepSpeed's own gate and experts
        rank, world = rank_and_world()
        check_ep_size(spec.ep_size, spec.num_experts, world)
        check_deepspeed()
        self.spec = spec
        # What the engine reads:
        self.ep_size, self.num_experts = spec.ep_size, spec.num_experts
        self.expert_group_name = f"ep_size_{spec.ep_size}"
        self.num_local_experts = spec.num_experts // spec.ep_size
        self.ep_rank = rank % spec.ep_size
        self.lora_A = nn.Parameter(torch.empty(self.num_local_experts, spec.in_features, spec.rank))
        self.lora_B = nn.Parameter(torch.empty(self.num_local_experts, spec.out_features, spec.rank))
        self.factor_names = FACTORS + INITIAL_FACTORS if spec.keeps_start else FACTORS
        for name, param in zip(INITIAL_FACTORS if spec.keeps_start else (), (self.lora_A, self.lora_B), strict=False):
            self.register_buffer(name, torch.zeros_like(param, requires_grad=False))
        self.is_connected = False
        self.dispatch = choose_dispatch(spec)
        self.gathers = Gathers()  # the engine gives all layers of a model the same
        self._dtype: torch.dtype | None = None  # in which the base layer last answered
        self.register_state_dict_post_hook(_split_experts)
        self._register_load_state_dict_pre_hook(_stack_experts, with_module=True)
        self.mark()

    @property
    def first_expert(self) -> int:
        """Global number of this rank's first expert."""
        return self.ep_rank * self.num_local_experts

    @property
    def group(self) -> dist.ProcessGroup:
        """The expert-parallel group; looked up, since modules are copied and pickled and groups cannot be."""
        group = expert_parallel_group(self.expert_group_name) if self.is_connected else None
        if group is None:
            raise ValueError(
                f"{self.spec.layer_name}: the ranks of an expert-parallel model are not connected yet; call "
                "deepspeed.initialize first. To use an adapter without DeepSpeed, load it with ep_size=1."
            )
        return group

    def mark(self) -> None:
        """Says to DeepSpeed that these parameters differ between the ranks of an expert-parallel group."""
        for param in (self.lora_A, self.lora_B):
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine: creates the groups, once for all layers, and settles whose experts these are."""
        create_groups(self.ep_size, use_data_before_expert_parallel_)
        self.is_connected = True
        self._move_to(dist.get_rank(self.group))

    @torch.no_grad()
    def _move_to(self, ep_rank: int) -> None:
        """Makes this rank the `ep_rank`-th of its group; if any rank changes place, experts are exchanged."""
        places = torch.zeros(dist.get_world_size(), 2, dtype=torch.long, device=self.lora_A.device)
        places[dist.get_rank()] = torch.tensor([self.ep_rank, ep_rank], device=places.device)
        dist.all_reduce(places)
        if torch.equal(places[:, 0], places[:, 1]):
            return
        source = [places[:, 0].tolist().index(place) for place in range(self.ep_size)]
        for name in self.factor_names:
            param = getattr(self, name)
            mine = param.detach().clone()
            for place in range(self.ep_size):  # one shard at a time passes by
                passing = mine if dist.get_rank() == source[place] else torch.empty_like(mine)
                dist.broadcast(passing, source[place])
                if place == ep_rank:
                    param.copy_(passing)
        self.ep_rank = ep_rank

    # -- the mixture --------------------------------------------------------------------------------------------------

    def prefetch(self, x: Tensor) -> None:
        """Starts gathering the experts, so that the base layer runs meanwhile. x: (..., I)."""
        if self.dispatch == "weights":
            self.gathers.start(self, self._dtype or _compute_dtype(x))

    @torch.compiler.disable
    def mix(self, x: Tensor, base_out: Tensor, inplace: bool, **options: Any) -> Tensor:
        """base_out + s * sum_i g_i(x) B_i A_i x over the experts of all processes; (T, I) -> (T, O).

        Every process of the group must call it equally often.

        Args:
            options: `gates`, and what else `mixture.operands.Operands` takes. All else as in `mixture.mix`.
        """
        self._dtype = base_out.dtype
        here, options = self._products(base_out.dtype), {"x": x, **options}
        if self.dispatch == "weights":
            gathered = Gathered(self, self.gathers, here)
            return mix(gathered.operands(base_out.dtype, **options), base_out, inplace=inplace, products=gathered).y
        operands = Operands(lora_A=self.lora_A, lora_B=self.lora_B, **options)
        return mix(operands, base_out, inplace=inplace, products=Exchanged(self.group, here)).y

    def _products(self, dtype: torch.dtype) -> Products:
        """`expert_compute`, for "auto" by the size of what one product covers."""
        spec, device = self.spec, self.lora_A.device.type
        if self.dispatch == "weights":
            return choose_products(spec.compute, spec.num_experts, spec.top_k, spec.rank, dtype, device)
        # A received row has chosen k / ep_size of the experts here, and at least one.
        top_k = max(1, spec.top_k // spec.ep_size)
        return choose_products(spec.compute, self.num_local_experts, top_k, spec.rank, dtype, device)

    def add_mean(self, y: Tensor, x: Tensor, scaling: float) -> Tensor:
        """y + (scaling / E) sum_i B_i A_i x of the start: a mixture whose gates are all 1 / E.

        Every process of the group must call it equally often.
        """
        rows, flat = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        gates = rows.new_full((len(rows), self.num_experts), 1 / self.num_experts, dtype=torch.float32)
        start = SimpleNamespace(lora_A=self.initial_A, lora_B=self.initial_B, group=self.group)
        gathered = Gathered(start, Gathers(), DENSE)
        operands = gathered.operands(flat.dtype, x=rows, scaling=scaling, gates=gates)
        return mix(operands, flat, products=gathered).y.view(y.shape)

    def topology(self) -> Tensor:
        """[ep_size, distance between the ranks of a group]: which experts a rank's optimizer state belongs to.

        It is saved with every expert: DeepSpeed would load the state of others, of the same size, in silence.
        """
        members = dist.get_process_group_ranks(self.group) if self.is_connected else [0, 1]
        return torch.tensor([self.ep_size, members[1] - members[0]])

    # -- whole tensors ------------------------------------------------------------------------------------------------

    def gather(self, name: str) -> Tensor | None:
        """All experts of a factor on the CPU of rank 0; only the group of rank 0 communicates."""
        group, param = self.group, getattr(self, name)
        members = dist.get_process_group_ranks(group)
        if 0 not in members:
            return None
        is_first = dist.get_rank() == 0
        mine = param.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in members] if is_first else None
        dist.gather(mine, parts, dst=0, group=group)
        return None if parts is None else torch.cat([part.cpu() for part in parts])

    def local_entries(self, prefix: str, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's experts of whole tensors, one by one, as `state_dict()` names them under `prefix`."""
        own = slice(self.first_expert, self.first_expert + self.num_local_experts)
        return self.one_by_one(prefix, {name: tensor[own] for name, tensor in whole.items()}) if whole else {}

    def one_by_one(self, prefix: str, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        entries = {f"{prefix}{EXPERTS}{i}.{TOPOLOGY}": self.topology() for i in range(self.num_local_experts)}
        for name, stacked in factors.items():
            entries |= {f"{prefix}{EXPERTS}{i}.{name}": expert for i, expert in enumerate(stacked)}
        return entries


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _split_experts(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: one entry per expert and factor."""
    assert isinstance(module, ShardedExperts)
    state_dict.update(module.one_by_one(prefix, {name: state_dict.pop(prefix + name) for name in module.factor_names}))


def _stack_experts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """The reverse, before loading.

    Raises:
        ValueError: the experts were saved in another topology.
    """
    assert isinstance(module, ShardedExperts)
    for key in [k for k in state_dict if k.startswith(prefix + EXPERTS) and k.endswith("." + TOPOLOGY)]:
        saved = state_dict.pop(key).tolist()
        if saved != module.topology().tolist():
            raise ValueError(
                f"this checkpoint was saved with ep_size={saved[0]} and expert-parallel ranks {saved[1]} apart, the "
                f"run has {module.ep_size} and {module.topology().tolist()[1]}: its optimizer state belongs to other "
                "experts. Resume in the same topology, from an elastic checkpoint, or anew from the saved adapter."
            )
    for name in module.factor_names:
        experts: dict[int, Tensor] = {}
        for key in [k for k in state_dict if k.startswith(prefix + EXPERTS) and k.endswith("." + name)]:
            experts[int(key[len(prefix + EXPERTS) :].split(".")[0])] = state_dict.pop(key)
        if experts:
            state_dict[prefix + name] = torch.stack([experts[i] for i in sorted(experts)])
