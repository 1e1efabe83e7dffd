"""What can be checked from files and settings alone, before a rank waits for another or a model is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from transformers import CONFIG_MAPPING

from ds_moelora.checkpoint.data_only import check_data_only
from ds_moelora.expert_parallel.spec import check_ep_size
from launch.checkpoint.resume import check_output_dir
from launch.checks.arguments import Arguments
from launch.checks.bounds import check_bounds
from launch.checks.deepspeed_config import check_optimizer, read_deepspeed_config
from launch.checks.effects import check_effects
from launch.checks.errors import UserError, process_rank
from launch.checks.extensions import remove_abandoned_locks


def preflight(arguments: Arguments) -> str:
    """All checks before torch.distributed opens; returns the optimizer's name."""
    remove_abandoned_locks()
    check_flags(arguments)
    name = check_optimizer(arguments)
    check_stage(arguments)
    check_output_dir(arguments)
    check_trusted(arguments)
    return name


def check_flags(arguments: Arguments) -> None:
    """What the flags alone show."""
    check_bounds(arguments)
    check_effects(arguments)


def check_stage(arguments: Arguments) -> None:
    """Whether ZeRO's stage, the number of processes and the packages here allow `--load_in_4bit` and `--ep_size`."""
    adapter, path = arguments.adapter, arguments.training.deepspeed
    stage = 0 if path is None else read_deepspeed_config(path).get("zero_optimization", {}).get("stage", 0)
    if arguments.run.load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
        if stage == 3:
            raise UserError(
                f"--load_in_4bit with {path}: ZeRO stage 3 shards weights by their elements, and 4-bit weights are "
                "blocks of packed bytes. Use stage 1 or 2, such as configs/zero2.json: the base is small."
            )
    if adapter.ep_size == 1:
        return
    if adapter.ep_size < 1:
        raise UserError(f"--ep_size {adapter.ep_size} must be at least 1.")
    try:
        check_ep_size(adapter.ep_size, adapter.num_experts, process_rank()[1])
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if path is None:
        raise UserError(f"--ep_size {adapter.ep_size} needs DeepSpeed: pass --deepspeed configs/zero2_ep.json.")
    if stage == 3:
        raise UserError(
            f"--ep_size {adapter.ep_size} with {path}: ZeRO stage 3 shards the experts over all ranks already. Use "
            "--ep_size 1, or a config of stage 1 or 2 such as configs/zero2_ep.json."
        )


def check_trusted(arguments: Arguments) -> None:
    """Looks for code in the model that will be loaded; checkpoints of this launcher are safetensors and JSON."""
    name = arguments.run.model_name_or_path
    if name is not None and os.path.isdir(name):
        _check_model(Path(name), arguments.training.trust_remote_code)


def _check_model(folder: Path, trusted: bool) -> None:
    """Code of the model's own, and weights in torch's format, which are read where there are no safetensors."""
    if not trusted and (code := _own_code(folder)):
        raise UserError(
            f"--model_name_or_path {folder} is a model that transformers does not know, with code of its own "
            f"({code}), which is not run unasked. Read that code, and pass --trust_remote_code if you trust it."
        )
    if any(folder.glob("*.safetensors")):
        return
    try:
        check_data_only(folder)
    except ValueError as error:
        raise UserError(f"--model_name_or_path: {error} Use a model with safetensors.") from error


def _own_code(folder: Path) -> str | None:
    """Where a model's config takes its class from, if transformers has none for it."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None  # said by transformers
    if not isinstance(config, dict) or "auto_map" not in config or config.get("model_type") in CONFIG_MAPPING:
        return None
    return str(config["auto_map"])
