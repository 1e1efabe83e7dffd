"""TensorBoard for mixtures: `MoELoRACallback` for transformers' Trainer, `EngineMonitor` for your own loop."""

from .callback import MoELoRACallback
from .descriptions import TAGS
from .engine import EngineMonitor

__all__ = ["TAGS", "EngineMonitor", "MoELoRACallback"]
