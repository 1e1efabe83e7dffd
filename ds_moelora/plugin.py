"""Registration with DeepSpeed and PEFT, done by `import ds_moelora`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .expert_parallel.spec import ShardSpec, register_shard_builder
from .optimizer import GateRiemannianAdamW, GateRiemannianMuon, GateRiemannianSGD
from .patches import install_at_import, install_for_expert_parallelism
from .tuner import register_with_peft

COMMAND = "ds-moelora"
OPTIMIZERS = (GateRiemannianAdamW, GateRiemannianSGD, GateRiemannianMuon)


def register() -> None:
    """Makes the optimizers and the tuner known by name; calling it again changes nothing.

    - DeepSpeed resolves `"optimizer": {"type": NAME}` by `getattr(torch.optim, NAME)`, and ZeRO accepts the classes
      listed in `ZERO_SUPPORTED_OPTIMIZERS`. Without DeepSpeed installed this part is left out, and so it is on the
      import by `ds-moelora` or `python -m ds_moelora`: DeepSpeed takes long to import and prints to stdout.
    - `ep_size > 1` gets its modules from `expert_parallel.shard`; without DeepSpeed it is refused.
    - PEFT resolves `peft_type` "MOELORA" through its enum and its mappings.
    - What must be replaced in other libraries is listed in `patches`.

    Raises:
        RuntimeError: another library put a different optimizer of the same name into `torch.optim`.
    """
    for optimizer in OPTIMIZERS:
        name = optimizer.__name__
        if getattr(torch.optim, name, optimizer) is not optimizer:
            raise RuntimeError(f"torch.optim.{name} is already taken by {getattr(torch.optim, name)!r}.")
        setattr(torch.optim, name, optimizer)
    with_deepspeed = find_spec("deepspeed") is not None and not _starts_as_command()
    install_at_import(with_deepspeed)
    register_with_peft()
    if with_deepspeed:
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

        register_shard_builder(_build_shard)
        ZERO_SUPPORTED_OPTIMIZERS.extend(o for o in OPTIMIZERS if o not in ZERO_SUPPORTED_OPTIMIZERS)


def _starts_as_command() -> bool:
    """Whether `ds-moelora` runs, or Python still looks for the module of `python -m`; argv[0] is "-m" meanwhile."""
    if Path(*sys.argv[:1]).name == COMMAND:
        return True
    follows = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return sys.argv[:1] == ["-m"] and follows[:1] == [__package__]


def _build_shard(spec: ShardSpec) -> Any:
    install_for_expert_parallelism()
    # Imported by who needs it: it subclasses a class of DeepSpeed's.
    from .expert_parallel.shard import ShardedExperts

    return ShardedExperts(spec)
