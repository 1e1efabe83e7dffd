"""axolotl: `plugins: [ds_moelora.integrations.axolotl.Plugin]`, and a DeepSpeed config that names the optimizer.

adapter: moelora          a mixture in place of `adapter: lora`; r, alpha, dropout and targets are the `lora_` keys
moelora:                  further fields of MoELoRAConfig
  num_experts: 8
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import TrainerCallback

from ..optimizer.guard import OURS
from ..tuner import MoELoRAConfig


class Arguments(BaseModel):
    """The plugin's own key in axolotl's YAML."""

    moelora: dict[str, Any] | None = None


class Plugin(BasePlugin):
    """`adapter: moelora`, and a check that the optimizer that the DeepSpeed config names is the one that trains."""

    def get_input_args(self) -> str:
        return f"{__name__}.Arguments"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="moelora")]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """(model with the mixture, its configuration); None for another adapter."""
        if cfg.adapter != "moelora":
            return None
        given = {"r": cfg.lora_r, "lora_alpha": cfg.lora_alpha, "lora_dropout": cfg.lora_dropout}
        config = MoELoRAConfig(
            target_modules="all-linear" if cfg.lora_target_linear else cfg.lora_target_modules,
            modules_to_save=cfg.lora_modules_to_save or None,
            task_type="CAUSAL_LM",
            **{name: value for name, value in given.items() if value is not None},
            **dict(cfg.moelora or {}),
        )
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        name = named_optimizer(cfg.deepspeed)
        return [RefuseOthers(name)] if name in OURS else []


class RefuseOthers(TrainerCallback):
    """Ends a run that is about to train with another optimizer.

    Without a GPU axolotl can leave DeepSpeed, and its config with it, out of the run, which then trains with AdamW.

    Args:
        name: the optimizer's class, as the DeepSpeed config names it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        seen = []
        while optimizer is not None and optimizer not in seen:  # accelerate's wrapper, ZeRO's, ours
            seen.append(optimizer)
            if type(optimizer).__name__ == self.name:
                return
            optimizer = getattr(optimizer, "optimizer", None)
        raise ValueError(
            f"the DeepSpeed config asks for {self.name}, but {type(seen[-1]).__name__ if seen else 'no optimizer'} is "
            "about to train. Start axolotl with a launcher (axolotl train, accelerate launch, torchrun) on devices "
            "that DeepSpeed uses, or take `deepspeed` out of the YAML."
        )


def named_optimizer(deepspeed: str | dict[str, Any] | None) -> str:
    """The `type` in the optimizer block of a DeepSpeed config, given as a file or as itself; "" without one."""
    if not deepspeed:
        return ""
    config = json.loads(Path(deepspeed).read_text()) if isinstance(deepspeed, str) else deepspeed
    return (config.get("optimizer") or {}).get("type", "")
