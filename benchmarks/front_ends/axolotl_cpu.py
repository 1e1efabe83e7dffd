"""What axolotl needs on a machine without GPUs: it puts process N on device N, of which there is none."""

from __future__ import annotations

from typing import Any

import transformers
from axolotl.integrations.base import BasePlugin


class Plugin(BasePlugin):
    """Loads models without a device map, and trains on CPUs."""

    def pre_model_load(self, cfg: Any) -> None:
        plain = transformers.PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
            return plain(cls, *args, **kwargs)

        transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}
