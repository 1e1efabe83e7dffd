"""One adapter's experts and router in one layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..expert_parallel.spec import FACTORS, INITIAL_FACTORS, ShardSpec, build_shard
from ..mixture.choice import choose_products
from ..mixture.goat import mean_product
from ..mixture.initial_values import draw_uniform_
from ..mixture.mixture import mix
from ..mixture.operands import Operands, Products, RoutingRule
from ..mixture.routing import route
from ..pairs import GateSettings, LoraPair, tag_pair
from .config import MoELoRAConfig
from .losses import RouterRecord, active_collector, coefs_of, router_losses, sequences_of
from .router import Router, as_in_forward, has_no_hooks
from .shared_expert import SharedExpert
from .start.base_weight import HASH_SHAPE
from .start.residual import Residual

if TYPE_CHECKING:
    from ..expert_parallel.shard import ShardedExperts


class MoELoRAExperts(nn.Module):
    """One adapter's experts and router in one layer: `lora_A` (E, I, R), `lora_B` (E, O, R), `router.weight` (E, I).

    `lora_A` is (1, I, R) with `shared_A`. With `shared_expert` there is a `SharedExpert`, too, called `shared`.

    With `ep_size > 1` the experts are those of this rank, and lie in `shard` (`expert_parallel.spec`); the router is
    whole on every rank.

    Args:
        in_features: I. out_features: O.
        config: the adapter's configuration in this layer (`patterns.layer_config`).
        adapter_name: the adapter's name. layer_name: the layer's qualified name; both for messages and for seeds.

    Raises:
        ValueError: `ep_size` does not fit the experts or the world size, or DeepSpeed is not there.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    base_hash: Tensor

    def __init__(
        self, in_features: int, out_features: int, config: MoELoRAConfig, adapter_name: str, layer_name: str
    ) -> None:
        super().__init__()
        self.adapter_name = adapter_name
        self.was_called = False
        self.num_experts, self.rank = config.num_experts, config.r
        self.rule = RoutingRule(config.top_k, config.top_p, config.router_temperature)
        self.scaling = config.scaling_of(in_features)
        self.coefs = coefs_of(config)
        self.dropout = nn.Dropout(config.lora_dropout)
        names = (layer_name, adapter_name)
        self.router = Router(in_features, config.num_experts, names, config.router_temperature, config.router_jitter)
        self.expert_compute = config.expert_compute
        self.is_sharded = config.ep_size > 1
        if self.is_sharded:
            spec = ShardSpec(
                layer_name=layer_name,
                num_experts=config.num_experts,
                ep_size=config.ep_size,
                top_k=config.top_k,
                in_features=in_features,
                out_features=out_features,
                rank=config.r,
                dispatch=config.ep_dispatch,
                compute=config.expert_compute,
                keeps_start=config.from_svd,
            )
            self.add_module("shard", build_shard(spec))
        else:
            num_A = 1 if config.shared_A else config.num_experts
            self.lora_A = nn.Parameter(torch.empty(num_A, in_features, config.r))
            self.lora_B = nn.Parameter(torch.empty(config.num_experts, out_features, config.r))
        self.residual = Residual() if config.from_svd else None
        if config.from_svd:
            self.register_buffer("base_hash", torch.zeros(HASH_SHAPE, dtype=torch.uint8))
            if not self.is_sharded:
                for name, param in (("initial_A", self.lora_A), ("initial_B", self.lora_B)):
                    self.register_buffer(name, torch.zeros_like(param, requires_grad=False))
        # Here and not later: inside deepspeed.zero.Init, parameters are cut up as soon as __init__ returns.
        self.reset_parameters(config.init_lora_weights, layer_name)
        self.shared = (
            SharedExpert(
                in_features, out_features, config.r, self.scaling, names, config.init_lora_weights is not False
            )
            if config.shared_expert
            else None
        )
        # A shared A makes one pair of all experts: the metric of [B_1; ...; B_E] A (docs/routing.md).
        self.pair = LoraPair(
            name=layer_name,
            num_experts=len(self.factors()[0]),
            rank=config.r,
            scaling=self.scaling,
            gate=GateSettings(),
        )
        self._register_load_state_dict_pre_hook(self.cut_whole_tensors)
        self.register_load_state_dict_post_hook(_tag_after_load)
        self.tag()

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.rule.top_k

    def experts_shard(self) -> ShardedExperts:
        """The module that holds this rank's experts; only with `is_sharded`."""
        return self.get_submodule("shard")  # type: ignore[return-value]

    @property
    def _holder(self) -> Any:
        return self.experts_shard() if self.is_sharded else self

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B: all experts', or those of this rank."""
        return self._holder.lora_A, self._holder.lora_B

    def factor_names(self) -> tuple[str, ...]:
        """Names of what has one entry per expert."""
        return FACTORS if self.residual is None else FACTORS + INITIAL_FACTORS

    def initial_factors(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of the start: all experts', or those of this rank; only with a `residual`."""
        return self._holder.initial_A, self._holder.initial_B

    def mean_of_start(self) -> Tensor:
        """(s / E) sum_i B_i A_i of the start (out, in), which the base weight gave away.

        Raises:
            ValueError: the experts are spread over ranks.
        """
        if self.is_sharded:
            raise ValueError(
                f"{self.pair.name}: with ep_size > 1 no rank has all starting factors of adapter "
                f"{self.adapter_name!r}, which the base weight needs to become W0 again. Load the adapter with "
                "ep_size=1 for that, or the base model anew."
            )
        return mean_product(*self.initial_factors(), self.scaling)

    def local_experts(self) -> slice:
        """Which of the E experts `factors()` are."""
        if not self.is_sharded:
            return slice(0, self.num_experts)
        shard = self.experts_shard()
        return slice(shard.first_expert, shard.first_expert + shard.num_local_experts)

    def add_mean(self, x: Tensor, y: Tensor, sign: float) -> Tensor:
        """y + sign * (s / E) sum_i B_i A_i x, with the factors of the start.

        Args:
            x: (..., I). y: (..., O). sign: 1 or -1.

        Returns:
            (..., O) in the dtype of y.
        """
        if self.is_sharded:
            return self.experts_shard().add_mean(y, x, sign * self.scaling)
        A, B = (factor.to(y.dtype).permute(1, 0, 2).flatten(1) for factor in self.initial_factors())
        return y + (sign * self.scaling / self.num_experts) * ((x.to(y.dtype) @ A) @ B.T)

    def reset_parameters(self, init_lora_weights: bool | str, layer_name: str) -> None:
        """Each expert's A as PEFT's LoRA: Kaiming-uniform, a = sqrt(5), i.e. uniform in +-1/sqrt(I). B zero.

        `init_lora_weights=False` draws B, too, from +-1/sqrt(R); what starts from singular values gets them later
        (`svd_init`). Every expert has a random stream of its own (`mixture.initial_values`), whoever holds it.
        """
        lora_A, lora_B = self.factors()
        first, names = self.local_experts().start, (layer_name, self.adapter_name)
        draw_uniform_(lora_A, 1 / math.sqrt(lora_A.shape[1]), *names, "lora_A", first)
        if init_lora_weights:
            nn.init.zeros_(lora_B)
        else:
            draw_uniform_(lora_B, 1 / math.sqrt(self.rank), *names, "lora_B", first)

    def tag(self, layer_name: str | None = None) -> None:
        """Puts the pair's tag on the parameters, as an optimizer needs it. Cheap, and may be repeated."""
        if layer_name is not None:
            self.pair.name = layer_name
        tag_pair(self.pair, *self.factors(), self.router.weight)
        if self.shared is not None:
            self.shared.tag(self.pair.name)
        if self.is_sharded:
            self.experts_shard().mark()

    def _apply(self, *args: Any, **kwargs: Any) -> MoELoRAExperts:
        super()._apply(*args, **kwargs)  # may make new Parameters (e.g. when leaving the meta device)
        self.tag()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copy.deepcopy and pickle end here, with new Parameters
        self.tag()

    @torch.compiler.disable
    def prefetch(self, x: Tensor) -> None:
        """Before the base layer runs, with `is_sharded`: starts the communication that can run beside it."""
        self.experts_shard().prefetch(x)

    def see_input_of_base(self) -> bool:
        """Whether the experts' input is the base layer's, so that one buffer can take the gradients of both."""
        return not self.is_sharded and not (self.training and self.dropout.p > 0)

    def forward(self, x: Tensor, base_out: Tensor, inplace: bool = False, base_weight: Tensor | None = None) -> Tensor:
        """base_out + s * sum_{i in topk} g_i(x) B_i A_i x, and + s * B A x of the shared expert.

        Args:
            x: (..., I). base_out: (..., O).
            inplace: `base_out` belongs to the caller alone and may be overwritten.
            base_weight: see `mixture.mix`; only where `see_input_of_base()`.

        Returns:
            (..., O) in the dtype of `base_out`.
        """
        if not self.was_called:
            self.was_called = True
        x_TI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        # A reshape to the same shape would be a view, onto which nothing may be added in place.
        base_TO = base_out if base_out.dim() == 2 else base_out.reshape(-1, base_out.shape[-1])
        inplace = inplace and _may_be_overwritten(base_TO)
        dropped_TI = self.dropout(x_TI) if self.training else x_TI
        if self.shared is not None:
            base_TO = self.shared(dropped_TI, base_TO, inplace, base_weight)
            base_weight, inplace = None, _may_be_overwritten(base_TO)  # this sum is nobody else's
        options: dict[str, Any] = {"scaling": self.scaling, "settings": self.pair.gate, "rule": self.rule}
        if self._sees_what_router_sees():
            options["router"] = self.router.weight
        else:
            logits = self.router(x_TI)
            gates = options["gates"] = route(logits, self.rule.top_k, self.rule.top_p)
        if self.is_sharded:
            y = self.experts_shard().mix(dropped_TI, base_TO, inplace, **options)
        else:
            operands = Operands(x=dropped_TI, lora_A=self.lora_A, lora_B=self.lora_B, **options)
            compute = self._products(base_TO)
            mixed = mix(operands, base_TO, inplace=inplace, base_weight=base_weight, products=compute)
            y = mixed.y
            if mixed.gates is not None:
                logits, gates = mixed.logits, mixed.gates
        self._hand_over(tuple(x.shape[:-1]), logits, gates)
        return y if base_out.dim() == 2 else y.view(base_out.shape)

    def _products(self, base_TO: Tensor) -> Products:
        sizes = (self.num_experts, self.top_k, self.rank, base_TO.dtype, base_TO.device.type)
        batch: dict[str, Any] = {"num_tokens": len(base_TO), "top_p": self.rule.top_p, "num_A": len(self.lora_A)}
        return choose_products(self.expert_compute, *sizes, **batch)

    def _hand_over(self, lead: tuple[int, ...], logits: Tensor, gates: Tensor) -> None:
        """Gives the router's losses to the active collector, and its decision to who listens."""
        collector = active_collector()
        if not (self.training or (collector is not None and collector.asked)):
            return
        compiling = torch.compiler.is_compiling()
        # Also without a collector, as in a recomputation: the same is saved for backward.
        if any(self.coefs) and not (compiling and collector is None):
            layout = None if collector is None else collector.layout
            losses = router_losses(logits, gates, self.coefs, lead, layout)
            if collector is not None:
                node, grad_enabled = None if compiling else logits.grad_fn, torch.is_grad_enabled()
                names = (self.adapter_name, self.coefs, self.pair.name)
                collector.last = RouterRecord(*names, losses, node, grad_enabled, collector.last)
        if collector is not None and collector.listener is not None and self.training:
            self._show(logits.detach(), gates, lead)

    @torch.compiler.disable
    def _show(self, logits: Tensor, gates: Tensor, lead: tuple[int, ...]) -> None:
        collector = active_collector()
        assert collector is not None
        assert collector.listener is not None
        collector.listener.saw_experts(self)
        collector.listener.saw_router(self, *sequences_of(logits, gates, lead, collector.layout))

    def _sees_what_router_sees(self) -> bool:
        """Whether router and experts get the same input, here, and nobody wants the router to be called."""
        is_plain = as_in_forward(self, "_router_is_plain", has_no_hooks(self.router))
        return self.see_input_of_base() and not (self.training and self.router.jitter) and is_plain

    def extra_repr(self) -> str:
        top_p = "" if self.rule.top_p is None else f", top_p={self.rule.top_p:g}"
        return f"num_experts={self.num_experts}, rank={self.rank}, top_k={self.top_k}{top_p}, scaling={self.scaling:g}"

    # A saved adapter has whole tensors, whatever the topology it was trained in.

    def cut_whole_tensors(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """With `is_sharded`, replaces whole `lora_A` (E, I, R), ... under `prefix` by this rank's shard's entries.

        Raises:
            ValueError: a tensor has another number of experts than the adapter.
        """
        if not self.is_sharded:
            return
        names = [name for name in self.factor_names() if prefix + name in state_dict]
        whole = {name: state_dict.pop(prefix + name) for name in names}
        for name, tensor in whole.items():
            if len(tensor) != self.num_experts:
                raise ValueError(
                    f"{prefix}{name} has {len(tensor)} experts, the adapter num_experts={self.num_experts}; load it "
                    "with the configuration that was saved beside it."
                )
        state_dict.update(self.experts_shard().local_entries(prefix + "shard.", whole))


def _may_be_overwritten(values: Tensor) -> bool:
    """False for a view, such as ZeRO-3's hooks hand over; a compiler finds out for itself what it may overwrite."""
    return not torch.compiler.is_compiling() and not values._is_view()


def _tag_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    # load_state_dict(assign=True), which PEFT uses with low_cpu_mem_usage, puts new Parameters in place.
    assert isinstance(module, MoELoRAExperts)
    module.tag()
