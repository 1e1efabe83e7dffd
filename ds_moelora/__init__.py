"""ds_moelora: Mixture-of-LoRA-experts and gate-scaled Riemannian optimizers for DeepSpeed.

Importing the package registers the optimizers with DeepSpeed and the tuner with PEFT (see `plugin.register`).
"""

from .adapters import MoELoRAConfig, MoELoRAModel, gather_experts, tag_lora_pairs
from .optim import GateRiemannianAdamW, GateRiemannianSGD
from .parallel.elastic import load_elastic, save_elastic
from .plugin import register

__version__ = "0.1.0"

__all__ = [
    "GateRiemannianAdamW",
    "GateRiemannianSGD",
    "MoELoRAConfig",
    "MoELoRAModel",
    "__version__",
    "gather_experts",
    "load_elastic",
    "register",
    "save_elastic",
    "tag_lora_pairs",
]

register()
