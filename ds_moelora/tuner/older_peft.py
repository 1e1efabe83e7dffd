"""PEFT 0.18 to 0.20, whose tuners have no say in how an adapter's weights are named in a file.

PEFT 0.21 asks `MoELoRAModel` through three class methods, which call PEFT's own. `OlderBaseTuner` stands in for these.
The wrappers (`patches.OLDER_PEFT`) make an older PEFT's two functions ask the class methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

VERSIONS = ("0.18", "0.21")
IS_OLDER = not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")
# Where PEFT has imported the two functions by name.
PLACES = ("peft", "peft.peft_model", "peft.utils", "peft.utils.save_and_load")


class OlderBaseTuner(BaseTuner):
    """What PEFT 0.21 has in `BaseTuner`, for a tuner whose parameters are all in `moelora_experts`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # older ones call `model.forward`, which runs no hooks

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        return _own(state_dict, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        rename: Any = cls._remove_adapter_name_from_key
        in_model = {rename(key, adapter_name): key for key in _own(model.state_dict(), adapter_name)}
        return {in_model.get(key, key): value for key, value in state_dict.items()}


def _own(state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if f".moelora_experts.{adapter_name}." in key}


def select_by_tuner(original: Callable[..., Any]) -> Callable[..., Any]:
    """`peft.get_peft_model_state_dict` that lets a tuner with the class methods above choose and name its weights."""

    def get_peft_model_state_dict(
        model: Any, state_dict: dict[str, Tensor] | None = None, adapter_name: str = "default", **kwargs: Any
    ) -> dict[str, Tensor]:
        config = model.peft_config[adapter_name]
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type, BaseTuner)
        if not issubclass(tuner, OlderBaseTuner):
            return original(model, state_dict, adapter_name, **kwargs)
        full = model.state_dict() if state_dict is None else state_dict
        others = {key: value for key, value in full.items() if tuner.prefix not in key}
        own = tuner._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, state_dict=full)
        own = {tuner._remove_adapter_name_from_key(key, adapter_name): value for key, value in own.items()}
        return original(model, others, adapter_name, **kwargs) | own

    return get_peft_model_state_dict


def check_by_tuner(original: Callable[..., Any]) -> Callable[..., Any]:
    """`peft.set_peft_model_state_dict`, before which such a tuner sees the weights."""

    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type, BaseTuner)
        if issubclass(tuner, OlderBaseTuner):
            tuner._remap_adapter_state_dict_for_load(
                model=model, config=config, adapter_name=adapter_name, state_dict=dict(peft_model_state_dict)
            )
        return original(model, peft_model_state_dict, adapter_name, **kwargs)

    return set_peft_model_state_dict
