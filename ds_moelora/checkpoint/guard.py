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
from .processes import agree, everyone, rank
from .record import compare, refuse_others, run_record
from .state_folder import write_flushed
from .trained import Run, trained_shapes

logger = logging.getLogger("ds_moelora")
RECORD = "moelora_record.json"


def record_when_saved(save: Callable[..., Any]) -> Callable[..., Any]:
    """`engine.save_checkpoint` that writes the record into the folder of the tag."""

    def save_checkpoint(self: Any, save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_dir, tag, *args, **kwargs)
        if _is_ours(self):
            record, failure = engine_record(self), None
            path = Path(save_dir) / str(tag or f"global_step{self.global_steps}") / RECORD
            try:
                if rank() == 0:
                    write_flushed(path, json.dumps(record, indent=1))
            except OSError as error:
                failure = error
            agree(failure, f"{path} could not be written")
        return result

    return save_checkpoint


def compare_when_loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    """`engine.load_checkpoint` that refuses another run's checkpoint before anything changes.

    Raises:
        ValueError: on every process, with both values of what cannot be meant.
    """

    def load_checkpoint(self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            path, saved, failure = Path(load_dir), None, None
            try:
                latest = path / ("latest_universal" if self.load_universal_checkpoint() else "latest")
                path = path / (str(tag) if tag is not None or not latest.is_file() else latest.read_text().strip())
                if (path / RECORD).is_file():
                    saved = json.loads((path / RECORD).read_text())
            except (OSError, ValueError, RecursionError) as error:
                failure = error
            agree(failure, f"{path / RECORD} cannot be read", ValueError)
            if all(everyone(isinstance(saved, dict))):
                assert saved is not None
                options = inspect.signature(load).bind(self, load_dir, tag, *args, **kwargs).arguments
                alone = options.get("load_module_only") or not options.get("load_optimizer_states", True)
                differences = compare(saved, engine_record(self))
                kept = [d for d in differences if not (alone and d.name.startswith("optimizer."))]
                for line in refuse_others(kept, str(path)):
                    if rank() == 0:
                        logger.warning(line)
        return load(self, load_dir, tag, *args, **kwargs)

    return load_checkpoint


def engine_record(engine: Any) -> dict[str, Any]:
    """Adapters, base model, optimizer, names and shapes of what an engine trains."""
    run = Run.of(engine)
    shapes = {f"trained.{name}": list(shape) for name, shape in trained_shapes(run.module).items()}
    return {**run_record(run.module, run.optimizer), **shapes}


def _is_ours(engine: Any) -> bool:
    """Whether the engine trains an optimizer of this package, or tagged pairs."""
    if type(getattr(engine, "basic_optimizer", None)).__module__.startswith(f"{__package__.partition('.')[0]}."):
        return True
    return any(tag_of(param) is not None for param in engine.module.parameters())
