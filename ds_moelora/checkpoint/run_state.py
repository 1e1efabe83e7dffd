"""What a run must keep beside its parameters: step counters, the scheduler's position, the dynamic loss scale.

Reads DeepSpeed's `loss_scaler` (ZeRO) and `loss_scale_config` (stage 0 in fp16); torch's GradScaler without DeepSpeed.
"""

from __future__ import annotations

from typing import Any

from .trained import Run

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def run_state(run: Run) -> dict[str, Any]:
    """Numbers and strings only, fit for JSON and independent of the topology.

    Raises:
        ValueError: the scheduler keeps more than numbers.
    """
    scaler = _dynamic_scaler(run)
    scale = scaler and {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)}
    return {
        "counters": {} if run.engine is None else {name: getattr(run.engine, name) for name in COUNTERS},
        "scheduler": None if run.scheduler is None else _scheduler_numbers(run.scheduler),
        "loss_scale": scale if run.scaler is None else run.scaler.state_dict(),
    }


def restore_run_state(run: Run, saved: dict[str, Any]) -> None:
    """Sets a run to where `run_state` was taken. The optimizer must have its learning rates again."""
    if run.engine is not None and saved["counters"]:
        for name in COUNTERS:
            setattr(run.engine, name, int(saved["counters"][name]))
        run.engine.micro_steps = run.engine.global_steps * run.engine.gradient_accumulation_steps()
    if run.scheduler is not None and saved["scheduler"] is not None:
        run.scheduler.load_state_dict({**run.scheduler.state_dict(), **saved["scheduler"]})
        _refresh_rates(run)
    scaler, scale = _dynamic_scaler(run), saved["loss_scale"] or {}
    if run.scaler is not None and scale:
        run.scaler.load_state_dict(scale)
    elif scaler is not None:
        for name in SCALER_FIELDS:
            if name in scale and hasattr(scaler, name):
                setattr(scaler, name, scale[name])


def base_rate(optimizer: Any, group: dict[str, Any]) -> float:
    """The learning rate that a group's schedule starts from, as it was configured."""
    return float(group.get("initial_lr", optimizer.defaults.get("lr", group["lr"])))


def _refresh_rates(run: Run) -> None:
    """Learning rates and schedule are those of this run's settings: a schedule in closed form is asked again."""
    groups, scheduler = run.optimizer.param_groups, run.scheduler
    if hasattr(scheduler, "lr_lambdas") and hasattr(scheduler, "base_lrs"):  # LambdaLR, which transformers uses
        for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]


def _scheduler_numbers(scheduler: Any) -> dict[str, Any]:
    """Its lists are left out: they have one entry per parameter group, which other topologies have others of.

    torch's LambdaLR has {} for a function that is an object without state (functools.partial), None for a plain one.
    """
    numbers = {}
    for name, value in scheduler.state_dict().items():
        if value is None or isinstance(value, (bool, int, float, str)):
            numbers[name] = value
        elif not isinstance(value, (list, tuple)) or not all(
            v in (None, {}) or isinstance(v, (int, float)) for v in value
        ):
            raise ValueError(
                f"{type(scheduler).__name__} keeps {name}={value!r:.80}, which an elastic checkpoint cannot carry over "
                "to other parameter groups: use another scheduler, or engine.save_checkpoint."
            )
    return numbers


def _dynamic_scaler(run: Run) -> Any:
    """The object whose `SCALER_FIELDS` are the state of DeepSpeed's dynamic loss scale; None without one."""
    for name, flag in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(run.wrapper, name, None)
        if scaler is not None and getattr(scaler, flag, False):
            return scaler
    return None
