"""What a run must keep beside its parameters: step counters, the scheduler's position, the dynamic loss scale.

Reads DeepSpeed's `loss_scaler` (ZeRO) and `loss_scale_config` (stage 0 in fp16).
"""

from __future__ import annotations

from typing import Any

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def run_state(engine: Any) -> dict[str, Any]:
    """Numbers and strings only, fit for JSON and independent of the topology.

    Raises:
        ValueError: the scheduler keeps more than numbers.
    """
    scaler = _dynamic_scaler(engine)
    return {
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "scheduler": None if engine.lr_scheduler is None else _scheduler_numbers(engine.lr_scheduler),
        "loss_scale": scaler and {name: getattr(scaler, name) for name in SCALER_FIELDS if hasattr(scaler, name)},
    }


def restore_run_state(engine: Any, saved: dict[str, Any]) -> None:
    """Sets an engine to where `run_state` was taken. The optimizer must have its learning rates again."""
    for name, value in saved["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    if engine.lr_scheduler is not None and saved["scheduler"] is not None:
        state = {**engine.lr_scheduler.state_dict(), **saved["scheduler"]}
        if "_last_lr" in state:
            state["_last_lr"] = [group["lr"] for group in engine.basic_optimizer.param_groups]
        engine.lr_scheduler.load_state_dict(state)
    scaler = _dynamic_scaler(engine)
    for name, value in (saved["loss_scale"] or {}).items():
        if scaler is not None and hasattr(scaler, name):
            setattr(scaler, name, value)


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


def _dynamic_scaler(engine: Any) -> Any:
    """The object whose `SCALER_FIELDS` are the state of a dynamic loss scale; None without one."""
    for name, flag in (("loss_scaler", "dynamic"), ("loss_scale_config", "dynamic_loss_scale")):
        scaler = getattr(engine.optimizer, name, None)
        if scaler is not None and getattr(scaler, flag, False):
            return scaler
    return None
