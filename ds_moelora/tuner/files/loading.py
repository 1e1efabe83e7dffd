"""Loading a saved adapter through PEFT: its files are checked before anything is built from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..config import PEFT_TYPES, MoELoRAConfig
from ..start.svd_init import factors_come_from_a_file
from .adapter_file import check_weights_file, read_config, saved_fields


def load_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.load_adapter` or `from_pretrained`, which refuses damaged and unreasonable files of a local folder.

    Nothing is decomposed for an adapter whose starting factors come from the file.
    """

    def load(*args: Any, **kwargs: Any) -> Any:
        given = (*args, kwargs.get("model_id"))
        model_id = next((arg for arg in given if isinstance(arg, str | os.PathLike)), "")
        folder = Path(model_id, kwargs.get("subfolder") or "")
        kind = saved_fields(folder).get("peft_type") if (folder / CONFIG_NAME).is_file() else ""
        if kind in PEFT_TYPES or not isinstance(kind, str):
            read_config(folder)
            if (folder / SAFETENSORS_WEIGHTS_NAME).exists():  # PEFT reads other formats, too
                check_weights_file(folder / SAFETENSORS_WEIGHTS_NAME)
        with factors_come_from_a_file():
            return original(*args, **kwargs)

    return load


class LoadUnderWay:
    """What a loader of PEFT's gets for `MoELoRAConfig` if its own look-up imported this package.

    Only `ds_moelora_autoload` gives it: this loader runs without `load_checked`, which came too late.
    """

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> MoELoRAConfig:
        """PEFT's, for a configuration whose weights will be loaded next."""
        config = MoELoRAConfig.from_pretrained(*args, **kwargs)
        config.weights_follow = True
        return config
