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

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from ..core.expert_parallel import ShardSpec, check_ep_size
from ..core.grouped import choose_compute
from ..core.moe_lora import ExpertCompute
from ..core.pairs import GateSettings
from .dispatch import PendingGather, bytes_moved, exchanged_moe_lora, gathered_moe_lora
from .engine_hooks import adapt_engine, create_groups, expert_group

EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
FACTORS = ("lora_A", "lora_B")
TOPOLOGY = "topology"
logger = logging.getLogger("ds_moelora")
_logged: set[tuple[Any, ...]] = set()


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
    """`core.expert_parallel.ExpertShard` over DeepSpeed's expert-parallel group.

    Before `deepspeed.initialize` it takes the group to be ep_size consecutive ranks, DeepSpeed's default. Where the
    engine finds otherwise (`use_data_before_expert_parallel_`), the experts change places then.

    Raises:
        ValueError: `ep_size` does not divide the world size, or the rank is not known.
    """

    def __init__(self, spec: ShardSpec) -> None:
        nn.Module.__init__(self)  # not MoE's, which builds DeepSpeed's own gate and experts
        rank, world = rank_and_world()
        check_ep_size(spec.ep_size, spec.num_experts, world)
        adapt_engine()
        self.spec = spec
        # What the engine reads:
        self.ep_size, self.num_experts = spec.ep_size, spec.num_experts
        self.expert_group_name = f"ep_size_{spec.ep_size}"
        self.num_local_experts = spec.num_experts // spec.ep_size
        self.ep_rank = rank % spec.ep_size
        self.lora_A = nn.Parameter(torch.empty(self.num_local_experts, spec.in_features, spec.rank))
        self.lora_B = nn.Parameter(torch.empty(self.num_local_experts, spec.out_features, spec.rank))
        self.is_connected = False
        self.dispatch = None if spec.dispatch == "auto" else spec.dispatch
        self._pending: PendingGather | None = None
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
        group = expert_group(self.expert_group_name) if self.is_connected else None
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
        for param in (self.lora_A, self.lora_B):
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
        if self.dispatch is None and self.training:
            self._choose_dispatch(x)
        if self._dispatch() == "weights":
            device = x.device.type
            autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
            self._pending = PendingGather(self.lora_A, self.lora_B, dtype, self.group)

    def _dispatch(self) -> str:
        # Until the first training batch has shown its size: what does not depend on it.
        return self.dispatch or "weights"

    def _choose_dispatch(self, x: Tensor) -> None:
        """Compares bytes, on the first training batch, whose tokens are counted over all ranks: all must agree."""
        spec, tokens = self.spec, torch.tensor([float(x.numel() // x.shape[-1])], device=x.device)
        dist.all_reduce(tokens, group=self.group)
        per_rank = tokens.item() / self.ep_size
        size = torch.finfo(x.dtype).bits // 8
        moved = bytes_moved(
            spec.num_experts, self.ep_size, spec.top_k, spec.in_features, spec.out_features, spec.rank, per_rank, size
        )
        self.dispatch = min(moved, key=lambda way: moved[way])
        shape = (spec.in_features, spec.out_features, spec.num_experts, self.ep_size, self.dispatch)
        if dist.get_rank() == 0 and shape not in _logged:
            _logged.add(shape)
            # A warning, since nothing below it is shown unless somebody has set up logging.
            logger.warning(
                f"ep_dispatch='auto' took {self.dispatch!r} for {spec.layer_name} and layers of its shape "
                f"({spec.in_features} -> {spec.out_features}): a rank sends {moved['weights'] / 1e6:.3g} MB per layer "
                f"and step by moving weights, {moved['tokens'] / 1e6:.3g} MB by moving its {per_rank:.0f} tokens; "
                f"experts are computed {self._compute(self.dispatch).name!r}."
            )

    def _compute(self, dispatch: str) -> ExpertCompute:
        """How a product is done over all experts ("weights") or this rank's ("tokens")."""
        spec = self.spec
        here = spec.num_experts if dispatch == "weights" else self.num_local_experts
        # A received row has chosen k / ranks of the experts here, and at least one.
        top_k = spec.top_k if dispatch == "weights" else max(1, spec.top_k // self.ep_size)
        return choose_compute(spec.compute, here, top_k, spec.rank)

    def mix(
        self,
        base_out: Tensor,
        x: Tensor,
        gates: Tensor,
        chosen: Tensor,
        scaling: float,
        settings: GateSettings | None,
        inplace: bool,
    ) -> Tensor:
        """base_out + s * sum_i g_i(x) B_i A_i x over the experts of all ranks; (T, I) -> (T, O)."""
        pending, self._pending = self._pending, None
        dispatch = self._dispatch()
        common = (base_out, x, gates, chosen, self.lora_A, self.lora_B, scaling, settings)
        if dispatch == "tokens":
            return exchanged_moe_lora(*common, self._compute(dispatch), self.group)
        if pending is not None and pending.dtype != base_out.dtype:
            pending.work.wait()  # a base layer that answers in another dtype than it is asked in (quantised)
            pending = None
        return gathered_moe_lora(*common, inplace, self._compute(dispatch), self.group, pending)

    def topology(self) -> Tensor:
        """[ep_size, distance between the ranks of a group]: which experts a rank's optimizer state belongs to.

        It is saved with every expert: DeepSpeed would load the optimizer state of others, of the same size, in silence.
        """
        members = dist.get_process_group_ranks(self.group) if self.is_connected else [0, 1]
        return torch.tensor([self.ep_size, members[1] - members[0]])

    # -- whole tensors ------------------------------------------------------------------------------------------------

    def gather(self, role: str) -> Tensor | None:
        """All experts of lora_A or lora_B on the CPU of rank 0; only the group of rank 0 communicates."""
        group, param = self.group, {"A": self.lora_A, "B": self.lora_B}[role]
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
        first, entries = self.first_expert, {}
        for i in range(self.num_local_experts if whole else 0):
            entries[f"{prefix}{EXPERTS}{i}.{TOPOLOGY}"] = self.topology()
        for name, tensor in whole.items():
            for i in range(self.num_local_experts):
                entries[f"{prefix}{EXPERTS}{i}.{name}"] = tensor[first + i]
        return entries


def _split_experts(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """State-dict hook: one entry per expert and factor."""
    assert isinstance(module, ShardedExperts)
    for i in range(module.num_local_experts):
        state_dict[f"{prefix}{EXPERTS}{i}.{TOPOLOGY}"] = module.topology()
    for name in FACTORS:
        stacked = state_dict.pop(prefix + name)
        for i, expert in enumerate(stacked):
            state_dict[f"{prefix}{EXPERTS}{i}.{name}"] = expert


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
                "experts. Resume in the same topology, or start anew from the saved adapter, which fits any."
            )
    for name in FACTORS:
        experts: dict[int, Tensor] = {}
        for key in [k for k in state_dict if k.startswith(prefix + EXPERTS) and k.endswith("." + name)]:
            experts[int(key[len(prefix + EXPERTS) :].split(".")[0])] = state_dict.pop(key)
        if experts:
            state_dict[prefix + name] = torch.stack([experts[i] for i in sorted(experts)])
