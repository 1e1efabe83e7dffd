"""The adapted layer: a frozen module, called as it is, plus mixtures of low-rank experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import MoELoRAConfig
from .experts import MoELoRAExperts
from .router import as_in_forward, has_no_hooks
from .start.base_weight import can_change, in_out_features
from .start.residual import check_ready, correct, unfold


class MoELoRALayer(nn.Module, BaseTunerLayer):
    """A module with in/out features, called as a black box, plus one `MoELoRAExperts` per adapter.

    With several active adapters their contributions add up, as in PEFT's LoRA.

    Args:
        base_layer: nn.Linear, Conv1D, or any module with in_features and out_features (e.g. a quantised linear).
        adapter_name: the first adapter. config: its configuration. layer_name: the layer's qualified name.
    """

    adapter_layer_names = ("moelora_experts",)
    other_param_names = ()

    base_layer: nn.Module
    moelora_experts: nn.ModuleDict
    # PEFT's, declared because type checkers take them for submodules.
    active_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoELoRAConfig, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        features = in_out_features(base_layer)
        assert features is not None, f"{layer_name}: the tuner checks that {type(base_layer)} can be adapted"
        self.in_features, self.out_features = features
        self.moelora_experts = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name)

    def update_layer(self, adapter_name: str, config: MoELoRAConfig, layer_name: str) -> None:
        """Adds (or replaces) the experts of an adapter, on the device and in the dtype of the base layer."""
        if adapter_name in self.moelora_experts:
            unfold(self, adapter_name)
        self.moelora_experts[adapter_name] = MoELoRAExperts(
            self.in_features, self.out_features, config, adapter_name, layer_name
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def experts(self, adapter_name: str) -> MoELoRAExperts:
        """The experts of one adapter."""
        experts = self.moelora_experts[adapter_name]
        assert isinstance(experts, MoELoRAExperts)
        return experts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """base_layer(x) + the active adapters' mixtures; (..., in_features) -> (..., out_features)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        all_experts = self.moelora_experts
        active = [name for name in self.active_adapters if name in all_experts]
        if self.disable_adapters or self.merged or not active:
            return correct(self, x, self.base_layer(x, *args, **kwargs), [])
        check_ready(self, active)
        mixtures: list[Any] = [all_experts[name] for name in active]
        for experts in mixtures:
            if experts.is_sharded:
                experts.prefetch(x)
        if not self._owns_base_output():
            y = self.base_layer(x, *args, **kwargs)
            for experts in mixtures:
                y = experts(x, y)
            return correct(self, x, y, active)
        # nn.Linear's output is a view unless its input is a matrix.
        x_TI = x.reshape(-1, x.shape[-1])
        # The first adapter computes the frozen layer's share of dx together with its own.
        together = torch.is_grad_enabled() and mixtures[0].see_input_of_base()
        base_weight = self.base_layer.weight if together else None
        with torch.no_grad() if base_weight is not None else nullcontext():
            y = self.base_layer(x_TI, *args, **kwargs)
        for experts in mixtures:
            y = experts(x, y, inplace=True, base_weight=base_weight)
            base_weight = None
        y = correct(self, x_TI, y, active)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _owns_base_output(self) -> bool:
        """Whether the base layer's output is x W^T + b with frozen W and b, and nothing but this layer can hold it.

        True for a plain nn.Linear without hooks. Its output may be overwritten, and its backward pass done elsewhere.
        """
        base = self.base_layer
        return (
            type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and as_in_forward(self, "_base_is_plain", has_no_hooks(base))
            and not base.weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; the base weight gets back what it gave to it."""
        if adapter_name in self.moelora_experts:
            unfold(self, adapter_name)
        super().delete_adapter(adapter_name)

    # Merging: exact for one expert, whose gate is always 1.

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """s * B A of an adapter with one expert (and the shared one's), in the layout of the base layer's weight.

        Less what it started with, where the base weight has not given that away already.

        Raises:
            ValueError: the adapter has several experts.
        """
        experts = self.experts(adapter_name)
        refuse_merge(adapter_name, experts.num_experts)
        wide = torch.promote_types(experts.lora_A.dtype, torch.float32)
        delta = experts.lora_B[0].to(wide) @ experts.lora_A[0].to(wide).t()
        if experts.shared is not None:
            delta += experts.shared.lora_B[0].to(wide) @ experts.shared.lora_A[0].to(wide).t()
        delta *= experts.scaling
        if experts.residual is not None and not experts.residual.folded:
            delta -= experts.mean_of_start()
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W += s * B A for each adapter, which must have one expert.

        Args:
            safe_merge: check the new weight for non-finite values before it is used.
            adapter_names: None: the active ones.

        Raises:
            ValueError: several experts, a base weight that is not a plain matrix, or a non-finite result.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.moelora_experts:
                continue
            delta, weight = self.get_delta_weight(name), self._base_matrix()
            merged = (weight.data + delta.to(weight.device)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"Merging adapter {name!r} would give non-finite weights; its weights are broken.")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes the merged adapters out of the base weight again (up to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            delta, weight = self.get_delta_weight(self.merged_adapters.pop()), self._base_matrix()
            weight.data = (weight.data - delta.to(weight.device)).to(weight.dtype)

    def _base_matrix(self) -> Tensor:
        base = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)
        if not can_change(base) or weight.numel() != self.in_features * self.out_features:
            raise ValueError(
                f"Cannot merge into a {type(base).__name__} whose weight is quantised or partitioned; merge into an "
                "unquantised copy of the base model, on one process."
            )
        return weight


def refuse_merge(adapter_name: str, num_experts: int) -> None:
    """Raises ValueError if an adapter with this many experts cannot be merged exactly."""
    if num_experts > 1:
        raise ValueError(
            f"Adapter {adapter_name!r} has num_experts={num_experts}: its gates depend on the token, so no single "
            "weight matrix equals it and it cannot be merged. Keep the adapter beside the base model, or train with "
            "num_experts=1, which merges exactly."
        )


def refuse_tied(layer_name: str, others: list[str]) -> None:
    """Raises ValueError if the base weight of a layer belongs to other modules too, which a merge would change."""
    if others:
        raise ValueError(
            f"{layer_name}: its weight is the same parameter as {', '.join(others)}, which merging would change as "
            "well. Give the layer a weight of its own before the adapter is put on (tie_word_embeddings=False and a "
            "copy), leave it out of target_modules, or keep the adapter beside the base model."
        )
