"""TensorBoard for mixtures: `MoELoRACallback` for transformers' Trainer, `EngineMonitor` for your own loop."""

from .callback import MoELoRACallback
from .engine import EngineMonitor
from .meter import TAGS

__all__ = ["TAGS", "EngineMonitor", "MoELoRACallback"]
