"""ds_moelora: Mixture-of-LoRA-experts and gate-scaled Riemannian optimizers for DeepSpeed.

Importing the package registers the optimizers with DeepSpeed and the tuner with PEFT (see `plugin.register`).
"""

from .checkpoint.data_only import check_data_only, data_only
from .checkpoint.elastic import load_elastic, save_elastic
from .optimizer import GateRiemannianAdamW, GateRiemannianMuon, GateRiemannianSGD
from .plugin import register
from .tuner import (
    MoELoRAConfig,
    MoELoRAModel,
    gather_experts,
    save_without_residual,
    start_from_lora,
    tag_lora_pairs,
    use_lora_experts,
)

__version__ = "0.1.0"

__all__ = [
    "GateRiemannianAdamW",
    "GateRiemannianMuon",
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
    "start_from_lora",
    "tag_lora_pairs",
    "use_lora_experts",
]

register()
