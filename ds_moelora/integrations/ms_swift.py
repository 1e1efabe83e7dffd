"""ms-swift: `--external_plugins FILE`, where FILE has the line `import ds_moelora.integrations.ms_swift`.

    --optimizer gate_riemannian_adamw | gate_riemannian_sgd    with a DeepSpeed config that has no optimizer block
    --optim_args damping=1e-6,gate_scaling=sqrt                the optimizer's other parameters
    --tuner_type moelora                                       a mixture of MOELORA='{"num_experts": 8}' (environment)

ms-swift reads `param_groups` of the stand-in that an optimizer block gives it, and ends there; so the optimizer is made
here. r, lora_alpha, lora_dropout, target_modules and modules_to_save of a mixture are ms-swift's own arguments.
"""

from __future__ import annotations

import ast
import json
import os
from typing import Any

from peft import get_peft_model
from swift.optimizers import OptimizerCallback, optimizers_map
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from ..optimizer import GateRiemannianAdamW, GateRiemannianSGD
from ..tuner import MoELoRAConfig, tag_lora_pairs


class AdamWCallback(OptimizerCallback):
    """Makes the optimizer over all trained parameters, in one group."""

    optimizer: type = GateRiemannianAdamW

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        trainer, args = self.trainer, self.args
        tag_lora_pairs(trainer.model)
        params = [p for p in trainer.model.parameters() if p.requires_grad]
        options = {**self.options(), **_parse(args.optim_args)}
        trainer.optimizer = self.optimizer(params, lr=args.learning_rate, weight_decay=args.weight_decay, **options)
        return trainer.optimizer

    def options(self) -> dict[str, Any]:
        """What ms-swift's arguments say beside learning rate and weight decay."""
        return {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}


class SGDCallback(AdamWCallback):
    """The same without Adam's arguments; `--optim_args momentum=0.9`."""

    optimizer = GateRiemannianSGD

    def options(self) -> dict[str, Any]:
        return {}


class MoELoRATuner(PeftTuner):
    """`--tuner_type moelora`; with `--adapters` the saved adapter says what the mixture is."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        from swift.pipelines.train.tuner import get_target_modules

        config = MoELoRAConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=get_target_modules(args, model),
            modules_to_save=args.modules_to_save or None,
            task_type="CAUSAL_LM" if args.task_type == "causal_lm" else None,
            **json.loads(os.environ.get("MOELORA", "{}")),
        )
        return get_peft_model(model, config)


def _parse(optim_args: str | None) -> dict[str, Any]:
    """ "damping=1e-6,gate_scaling=sqrt" as keyword arguments."""
    found = {}
    for item in filter(None, (optim_args or "").split(",")):
        name, _, value = item.partition("=")
        try:
            found[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


optimizers_map["gate_riemannian_adamw"] = AdamWCallback
optimizers_map["gate_riemannian_sgd"] = SGDCallback
tuners_map["moelora"] = MoELoRATuner
