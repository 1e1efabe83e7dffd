"""What can be checked from files and settings alone, before a rank waits for another or a model is loaded."""

from __future__ import annotations

from ds_moelora.expert_parallel.spec import check_ep_size
from launch.checkpoint.resume import check_output_dir
from launch.checks.arguments import Arguments
from launch.checks.bounds import check_bounds
from launch.checks.deepspeed_config import check_optimizer, read_deepspeed_config
from launch.checks.effects import check_effects
from launch.checks.errors import UserError, process_rank
from launch.checks.extensions import remove_abandoned_locks
from launch.checks.trusted import check_trusted
from launch.data.data_checks import check_data


def preflight(arguments: Arguments) -> str:
    """All checks before torch.distributed opens; returns the optimizer's name."""
    remove_abandoned_locks()
    check_flags(arguments)
    name = check_optimizer(arguments)
    check_expert_parallel(arguments)
    check_output_dir(arguments)
    check_trusted(arguments)
    return name


def check_flags(arguments: Arguments) -> None:
    """What the flags alone show."""
    check_bounds(arguments)
    check_data(arguments)
    check_effects(arguments)


def check_expert_parallel(arguments: Arguments) -> None:
    """Finds settings with which the experts cannot be spread over the ranks."""
    adapter, path = arguments.adapter, arguments.training.deepspeed
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
    if read_deepspeed_config(path).get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError(
            f"--ep_size {adapter.ep_size} with {path}: ZeRO stage 3 shards the experts over all ranks already. Use "
            "--ep_size 1, or a config of stage 1 or 2 such as configs/zero2_ep.json."
        )
