"""Finds out when DeepSpeed trains with another optimizer than the one of this package that was asked for.

`Trainer(optimizers=(optimizer, None))` under DeepSpeed drops the optimizer and trains with AdamW; accelerate with
`offload_optimizer` makes a DeepSpeedCPUAdam of it; a client optimizer beats the config's. None of them says so.
`check_after_configuring` wraps the function in which DeepSpeed's engine gets its optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..pairs import LoraPair, tag_of
from .factors import Factor
from .sharding.zero import configured_optimizer

OURS = ("GateRiemannianAdamW", "GateRiemannianSGD", "GateRiemannianMuon")


def await_step(factors: Sequence[Factor], optimizer: str) -> None:
    """Notes on pairs which optimizer was built for them and has not run: another one would be a surprise. "": none."""
    for factor in factors:
        factor.pair.awaits = optimizer


def check_after_configuring(original: Callable[..., Any]) -> Callable[..., Any]:
    """`DeepSpeedEngine._configure_optimizer`, and then `check_engine`."""

    def configure(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(engine, *args, **kwargs)
        check_engine(engine)
        return result

    return configure


def check_engine(engine: Any) -> None:
    """Refuses an engine that runs another optimizer than one of this package that its config or its user chose.

    Raises:
        ValueError: the config names one of ours, or one was built for pairs of the model and has not run; and the
            engine runs another class.
    """
    running, configured = engine.basic_optimizer, configured_optimizer(engine)
    pairs = _pairs(engine.module)
    names = {cls.__name__ for cls in type(running).__mro__}
    if configured in OURS and configured not in names:
        raise ValueError(
            f"the DeepSpeed config asks for {configured}, but the engine runs {type(running).__name__}, which it was "
            'given: pass no optimizer, or remove the "optimizer" block.'
        )
    built = sorted({pair.awaits for pair in pairs if pair.awaits})
    for pair in pairs:
        pair.awaits = ""  # said once: who wants the other optimizer after all can go on
    if built and not names & {*OURS, *built}:
        raise ValueError(
            f"{built[0]} was built for this model, but the engine runs {type(running).__name__} in its place "
            "(transformers replaces Trainer(optimizers=...) under DeepSpeed, accelerate replaces optimizers with "
            f'offload_optimizer). Name it in the DeepSpeed config instead, "optimizer": {{"type": "{built[0]}", '
            '"params": {...}}, or with offload_optimizer set "zero_force_ds_cpu_optimizer": false.'
        )


def _pairs(module: torch.nn.Module) -> list[LoraPair]:
    tags = [tag_of(p) for p in module.parameters()]
    return list({id(tag[0]): tag[0] for tag in tags if tag is not None}.values())
