"""torchrun trl_moe.py sft|dpo|kto|grpo MODEL DATA [TRL's flags]: MoE-LoRA in TRL's trainers, by `peft_config`."""

from __future__ import annotations

import sys

import trl
from assets import ADAPTER, NUM_EXPERTS
from datasets import load_dataset
from rewards import distinct

from ds_moelora import MoELoRAConfig

if __name__ == "__main__":
    algorithm, model, data, *flags = sys.argv[1:]
    config_class = getattr(trl, f"{algorithm.upper()}Config")
    trainer_class = getattr(trl, f"{algorithm.upper()}Trainer")
    (args,) = trl.TrlParser((config_class,)).parse_args_and_config(flags)
    mixture = MoELoRAConfig(num_experts=NUM_EXPERTS, **ADAPTER, task_type="CAUSAL_LM")
    extra = {"reward_funcs": distinct} if algorithm == "grpo" else {}
    rows = load_dataset(data, split="train")
    trainer = trainer_class(model=model, args=args, train_dataset=rows, peft_config=mixture, **extra)
    trainer.train()
    trainer.save_model(args.output_dir)
