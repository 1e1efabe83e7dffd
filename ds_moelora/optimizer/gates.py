"""Which living optimizer sets the gate scaling of which layers.

The scaling depends on the token, so a *layer* applies it, in its backward pass. `gate_scaling` is nevertheless an
option of the optimizer, so that a DeepSpeed config alone can choose it: an optimizer holds the `GateSettings` of the
layers that its pairs belong to, says so in one log line, and gives them back when it is garbage-collected.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ..pairs import GateConflictError, GateSettings
from .factors import Factor

logger = logging.getLogger("ds_moelora")
_keys = itertools.count()


class GateHold:
    """One optimizer's hold on the gate settings of its layers.

    Args:
        owner: the optimizer; its end ends the hold. Nothing here refers to it.
    """

    def __init__(self, owner: Any) -> None:
        self._key, self._name = next(_keys), type(owner).__name__
        self._held: list[GateSettings] = []
        self._named_gateless = False
        self._said: Counter[tuple[str, bool]] = Counter()
        weakref.finalize(owner, _release, self._key, self._held)

    def take(self, factors: Sequence[Factor], groups: Mapping[int, Mapping[str, Any]]) -> None:
        """Holds the layers of `factors`, each at the settings of its lora_A's group, and no others.

        Raises:
            ValueError: another living optimizer holds one of them at other settings; nothing is held then.
        """
        _release(self._key, self._held)
        wanted = [(f, groups[f.group]) for f in factors if f.role == "A" and f.pair.gate is not None]
        try:
            self._hold(wanted)
        except GateConflictError:
            gc.collect()  # the other one may be garbage that nobody has collected yet
            self._hold(wanted)
        self._name_gateless(factors, groups)
        self._say(Counter((group["gate_scaling"], group["scale_input_grad"]) for _, group in wanted))

    def _hold(self, wanted: Sequence[tuple[Factor, Mapping[str, Any]]]) -> None:
        try:
            for factor, group in wanted:
                gate = factor.pair.gate
                assert gate is not None
                settings = group["gate_scaling"], group["scale_input_grad"]
                gate.hold(self._key, self._name, factor.pair.name, *settings)
                self._held.append(gate)
        except GateConflictError:
            _release(self._key, self._held)
            raise

    def _name_gateless(self, factors: Sequence[Factor], groups: Mapping[int, Mapping[str, Any]]) -> None:
        """Warns once of experts whose gates no layer of this package knows: those of a MoE base model."""
        names = [
            factor.pair.name
            for factor in factors
            if factor.role == "A" and factor.pair.gate is None and factor.pair.num_experts > 1
            if factor.pair.rank_first_A  # PEFT's stacks; others were tagged by hand and have no gate
            if groups[factor.group]["gate_scaling"] != "none"
        ]
        if names and not self._named_gateless:
            self._named_gateless = True
            warnings.warn(
                f"gate_scaling has no effect on the base model's experts in {names[0]} ({len(names)} pairs of stacks): "
                "call ds_moelora.use_lora_experts(model) before the optimizer is built, or set gate_scaling='none'.",
                stacklevel=2,
            )

    def _say(self, settings: Counter[tuple[str, bool]]) -> None:
        if settings == self._said or not any(s != ("none", False) for s in settings) or not _is_first_process():
            return
        self._said = settings
        held = ", ".join(
            f"{count} at gate_scaling={scaling!r}{' with scale_input_grad' if with_input else ''}"
            for (scaling, with_input), count in settings.items()
        )
        logger.info("%s sets the gradients of its mixture layers until it is released: %s.", self._name, held)


def _release(key: int, held: list[GateSettings]) -> None:
    while held:
        held.pop().release(key)


def _is_first_process() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
