"""What monitoring reads of a DeepSpeed engine: its optimizer, its config, and where its `tensorboard` block writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def basic_optimizer(optimizer_or_engine: Any) -> Any:
    """The optimizer that steps, under the wrappers of DeepSpeed and accelerate."""
    inner = getattr(optimizer_or_engine, "basic_optimizer", None)
    found = optimizer_or_engine if inner is None else inner
    while getattr(found, "optimizer", None) is not None:
        found = found.optimizer
    return found


def ds_config(engine: Any) -> dict[str, Any]:
    """The configuration that the engine was given, as a dict or as the path of a file."""
    given = engine.config
    return dict(given) if isinstance(given, dict) else json.loads(Path(given).read_text())


def zero_stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def check_monitor(engine: Any) -> None:
    """Raises a ValueError if nothing that the engine is told about is written anywhere."""
    if not engine.monitor.enabled:
        raise ValueError(
            "this engine's DeepSpeed config has no monitor switched on; add "
            '"tensorboard": {"enabled": true, "output_path": "runs", "job_name": "mixture"} to it (or csv_monitor, '
            "wandb, comet)."
        )


def write_events(engine: Any, events: list[tuple[str, float, int]]) -> None:
    """(tag, value, step) to every monitor of the DeepSpeed config; call it on every rank."""
    engine.monitor.write_events(events)


def tensorboard_writer(engine: Any) -> Any:
    """The `SummaryWriter` behind the config's `tensorboard` block, for images and text; None on other ranks than 0."""
    return getattr(engine.monitor.tb_monitor, "summary_writer", None)
