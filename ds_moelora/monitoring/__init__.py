"""TensorBoard for mixtures: `MoELoRACallback` for transformers' Trainer, `EngineMonitor` for a loop of one's own."""

from .callback import MoELoRACallback
from .engine import EngineMonitor
from .meter import TAGS

__all__ = ["TAGS", "EngineMonitor", "MoELoRACallback"]
