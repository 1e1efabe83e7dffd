"""ds_moelora: Mixture-of-LoRA-experts and gate-scaled Riemannian optimizers for DeepSpeed.

Importing the package registers the optimizers with DeepSpeed and the tuner with PEFT (see `plugin.register`).
"""

from .adapters import MoELoRAConfig, MoELoRAModel, gather_experts, save_without_residual, tag_lora_pairs
from .optim import GateRiemannianAdamW, GateRiemannianSGD
from .parallel.data_only import check_data_only, data_only
from .parallel.elastic import load_elastic, save_elastic
from .plugin import register

__version__ = "0.1.0"

__all__ = [
    "GateRiemannianAdamW",
    "GateRiemannianSGD",
    "MoELoRAConfig",
    "MoELoRAModel",
    "__version__",
    "check_data_only",
    "data_only",
    "gather_experts",
    "load_elastic",
    "register",
    "save_elastic",
    "save_without_residual",
    "tag_lora_pairs",
]

register()
