"""DeepSpeed's own checkpoints of mixtures: a record beside them, compared before they are loaded.

`engine.load_checkpoint` copies an optimizer's flat partitions wherever the sizes fit: q_proj's weights into k_proj's
experts, another optimizer's moments into this one's. `ds_moelora.patches` wraps both methods of the engine; engines
without a mixture and without an optimizer of this package pass through unchanged.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..pairs import tag_of
from .processes import everyone, rank, together
from .record import compare, refuse_others, run_record
from .trained import Run

logger = logging.getLogger("ds_moelora")
RECORD = "moelora_record.json"


def record_when_saved(save: Callable[..., Any]) -> Callable[..., Any]:
    """`engine.save_checkpoint` that writes the record into the folder of the tag."""

    def save_checkpoint(self: Any, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_dir, tag, *args, **kwargs)
        if _is_ours(self):
            record = run_record(Run.of(self))
            path = Path(save_dir) / str(tag or f"global_step{self.global_steps}") / RECORD
            with together(f"{path} could not be written", OSError):
                if rank() == 0:
                    path.write_text(json.dumps(record, indent=1))
        return result

    return save_checkpoint


def compare_when_loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    """`engine.load_checkpoint` that refuses another run's checkpoint before anything changes.

    Raises:
        ValueError: on every process, with both values of what cannot be meant.
    """

    def load_checkpoint(self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            options = inspect.signature(load).bind(self, load_dir, tag, *args, **kwargs).arguments
            alone = options.get("load_module_only") or not options.get("load_optimizer_states", True)
            for line in _compare(self, Path(load_dir), tag, weights_alone=bool(alone)):
                if rank() == 0:
                    logger.warning(line)
        return load(self, load_dir, tag, *args, **kwargs)

    return load_checkpoint


def _compare(engine: Any, folder: Path, tag: Any, weights_alone: bool) -> list[str]:
    """The lines to say of a checkpoint that has a record; [] without one. A collective call."""
    saved: dict[str, Any] | None = None
    kinds = (OSError, ValueError, TypeError, RecursionError)
    with together(f"the {RECORD} of {folder} cannot be read", *kinds, kind=ValueError):
        latest = folder / ("latest_universal" if engine.load_universal_checkpoint() else "latest")
        folder /= str(tag) if tag is not None or not latest.is_file() else latest.read_text().strip()
        if (folder / RECORD).is_file():
            saved = dict(json.loads((folder / RECORD).read_text()))
    if not all(everyone(saved is not None)):
        return []
    assert saved is not None
    differences = compare(saved, run_record(Run.of(engine)))
    return refuse_others(
        [d for d in differences if not (weights_alone and d.name.startswith("optimizer."))], str(folder)
    )


def _is_ours(engine: Any) -> bool:
    """Whether the engine trains an optimizer of this package, or tagged pairs."""
    if type(getattr(engine, "basic_optimizer", None)).__module__.startswith(f"{__package__.partition('.')[0]}."):
        return True
    return any(tag_of(param) is not None for param in engine.module.parameters())
