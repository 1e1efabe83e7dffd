"""The peer of `bench_training`: the same launcher, data and DeepSpeed config, with PEFT's LoRA in the mixture's place.

`--num_experts E --lora_r r` makes a LoRA of rank E r; the flags that are about routing mean nothing here.
"""

from __future__ import annotations

import sys
from typing import Any

from peft import LoraConfig

from launch import train
from launch.checks.errors import run_guarded
from launch.checks.flags import AdapterArguments
from launch.training import modeling


def lora_config(adapter: AdapterArguments, task: str) -> Any:
    """A LoRA with as many adapted parameters as the mixture's experts."""
    rank, targets = adapter.num_experts * adapter.r, adapter.target_modules
    return LoraConfig(
        task_type=modeling.TASK_TYPES[task],
        r=rank,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )


if __name__ == "__main__":
    modeling.adapter_config = lora_config
    run_guarded(train.main, debug="--show_traceback" in sys.argv)
