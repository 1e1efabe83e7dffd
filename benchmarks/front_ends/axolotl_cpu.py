"""What axolotl needs here: it puts process N on device N, of which a machine without GPUs has none, and sets no seed
before it makes the adapter, so that no two runs start alike."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):
    """Loads models without a device map, trains on CPUs, and seeds the adapter."""

    def pre_model_load(self, cfg: Any) -> None:
        plain = transformers.PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
            return plain(cls, *args, **kwargs)

        transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        torch.manual_seed(cfg.seed)

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}
