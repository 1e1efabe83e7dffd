"""The tuner: PEFT's view of a model with mixtures of LoRA experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..expert_parallel.spec import FACTORS, INITIAL_FACTORS
from .base_experts import wrap_parameter
from .checks import check_adapter_name, check_complete, check_finite, check_not_partitioned
from .config import MoELoRAConfig
from .files.saving import cut_for_loading, sharded_experts, with_whole_experts
from .layer import MoELoRALayer, refuse_merge, refuse_tied
from .loss_hooks import LossHooks
from .losses import RouterListener
from .older_peft import IS_OLDER, OlderBaseTuner
from .patterns import check_patterns, layer_config
from .start.base_weight import shared_weights
from .start.residual import unfold
from .start.svd_init import check_base_weights, check_svd_targets, start_from_singular_values, take_over_start
from .tags import tag_model
from .targets import check_targets, expand, target_names

PREFIX = "moelora_"
_Base: Any = OlderBaseTuner if IS_OLDER else BaseTuner


class MoELoRAModel(_Base):
    """A model whose target modules carry mixtures of LoRA experts; made by `peft.get_peft_model`.

    The load-balancing loss joins the model's own loss in hooks on the base model's forward (`loss_hooks`), not in
    `MoELoRAModel.forward`: PEFT's plain `PeftModel` (no `task_type`) calls the base model directly.

    Attributes:
        last_aux_loss: the load-balancing loss of the last training forward, without its coefficient (1 at perfect
            balance), a detached 0-dim tensor on the device; None before the first, or if its coefficient is 0.
        last_router_z_loss: the router z-loss, likewise.
        router_listener: is shown what routers decide in training forwards.
    """

    prefix: str = PREFIX
    tuner_layer_cls: Any = (MoELoRALayer, ParamWrapper)  # for isinstance
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    last_aux_loss: Tensor | None = None
    last_router_z_loss: Tensor | None = None
    router_listener: RouterListener | None = None

    _loss_hooks: LossHooks | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        self._loss_hooks = LossHooks(self, model)
        for config in self.peft_config.values():
            self._loss_hooks.offer_aux_loss(config)

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if config.from_svd:
            start_from_singular_values(model, adapter_name, config)
        if self._loss_hooks is not None:  # a further adapter
            self._loss_hooks.offer_aux_loss(config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        from_mapping = peft_config.target_modules is None
        if from_mapping and model_config["model_type"] not in self.target_module_mapping:
            raise ValueError(
                f"There is no default for target_modules on a model of type {model_config['model_type']!r}; pass "
                "target_modules=[...] with the names of the modules to adapt, or 'all-linear'."
            )
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if from_mapping or isinstance(peft_config.target_modules, str):
            peft_config.target_modules = expand(peft_config, self.model)
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        check_targets(peft_config, model, self._check_target_module_exists)
        check_patterns(peft_config, target_names(peft_config, model, self._check_target_module_exists))
        if peft_config.from_svd:
            check_svd_targets(peft_config, model, self._check_target_module_exists)

    def _create_and_replace(
        self,
        peft_config: MoELoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            layer: nn.Module | None = wrap_parameter(peft_config, adapter_name, target, parameter_name)
        elif isinstance(target, MoELoRALayer):
            layer = None
            target.update_layer(adapter_name, layer_config(peft_config, current_key), current_key)
        else:
            layer = MoELoRALayer(target, adapter_name, layer_config(peft_config, current_key), current_key)
        if layer is None:  # the target has taken the adapter
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter trains only once it is made the active one
        self._replace_module(parent, target_name, layer, target)

    def tag(self) -> None:
        """Puts the pairs' tags on the parameters (again)."""
        tag_model(self.model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's last word in get_peft_model, add_adapter and load_adapter; it makes new Parameters.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        self.tag()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names (a different adapter for each row of the batch) is not supported by MoE-LoRA; call "
                "set_adapter and run one batch per adapter."
            )
        yield

    # Merging and unloading

    def _refuse_merge(self, adapter_names: list[str] | None) -> None:
        shared = shared_weights(self.model)
        for layer_name, layer in self.model.named_modules():
            if isinstance(layer, MoELoRALayer):
                for name in self.active_adapters if adapter_names is None else adapter_names:
                    if name in layer.moelora_experts:
                        refuse_merge(name, layer.experts(name).num_experts)
                        tied = shared.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
                        refuse_tied(layer_name, [other for other in tied if not other.startswith(f"{layer_name}.")])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """W += s B A; exact, and allowed, for adapters with one expert only.

        Raises:
            ValueError: an adapter has several experts, or a weight belongs to other modules too.
        """
        self._refuse_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_merge(adapter_names)
        merged = (self.active_adapters if adapter_names is None else adapter_names) if merge else []
        for layer in self.model.modules():
            if isinstance(layer, MoELoRALayer):
                for name in set(layer.moelora_experts) - {*merged, *layer.merged_adapters}:
                    unfold(layer, name)
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        assert self._loss_hooks is not None
        self._loss_hooks.remove()
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of mixtures with different routers is not a mixture.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "add_weighted_adapter is not supported by MoE-LoRA: adapters with different routers have no weighted sum "
            "of the same form. base_model.set_adapter([name, ...]) adds up several adapters' outputs."
        )

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # "...moelora_experts.default.router.weight": the name is not where PEFT's own rule looks for it.
        key = re.sub(rf"(\.lora_[AB])\.{re.escape(adapter_name)}(?=\.weight$)", r"\1", key)  # of `target_parameters`
        return re.sub(rf"\.moelora_experts\.{re.escape(adapter_name)}\.(?=[^.]+(\.[^.]+)?$)", ".moelora_experts.", key)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        check_not_partitioned(selected)
        # With every rank's experts: one that raised before they are gathered would leave the others waiting.
        whole = with_whole_experts(model, selected, state_dict, adapter_name)
        check_finite(whole)
        return whole

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        for name in sharded_experts(model, adapter_name):  # PEFT goes by the model's names, which are those of shards
            for factor in (f"{name}.{f}" for f in FACTORS + INITIAL_FACTORS):
                in_file = cls._remove_adapter_name_from_key(factor, adapter_name)
                if in_file in remapped:
                    remapped[factor] = remapped.pop(in_file)
        whole, remapped = remapped, cut_for_loading(model, remapped, adapter_name)
        layers = {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        check_complete(remapped, model.state_dict(), layers, adapter_name)
        check_base_weights(model, adapter_name, whole)
        take_over_start(model, adapter_name, whole)
        config.weights_follow = False
        return remapped
