"""Checkpoints are data: nothing that their files say is executed.

torch's files are pickles, and a pickle can call anything. DeepSpeed 0.19.8 reads its engine files with
`torch.load(weights_only=False)`, although they hold no more than tensors, numbers and objects of the few classes in
`CLASSES`. Here `torch.load` is held to `weights_only=True`, whose unpickler builds tensors, plain values and these
classes, and refuses everything else.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# What DeepSpeed's ZeRO files hold beside tensors; each only carries fields.
CLASSES = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
SUFFIXES = (".pt", ".pth", ".bin")
NEVER_READ = ("training_args.bin",)  # transformers writes its arguments, and reads them nowhere


@contextmanager
def data_only() -> Iterator[None]:
    """Inside, every `torch.load` of this process is one with `weights_only=True`, whatever its caller asks for.

    Put it around `engine.load_checkpoint(folder)`:

        with ds_moelora.data_only():
            engine.load_checkpoint(folder)

    Raises:
        ValueError: from inside, naming the file: it holds more than data.
    """
    original = torch.load

    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(f, *args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            raise ValueError(f"{f} holds more than data, and was not loaded ({_reason(error)}).") from error

    torch.load = load
    try:
        with torch.serialization.safe_globals(_classes()):
            yield
    finally:
        torch.load = original


def check_data_only(folder: str | Path) -> None:
    """Reads the pickles of a folder's torch files, but no tensor's values: does each hold data alone?

    Every rank can find out by itself, before any of them loads.

    Args:
        folder: a checkpoint; files in folders below it are looked at, too.

    Raises:
        ValueError: naming the first file that holds more than data, and what it would have called.
    """
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in SUFFIXES and path.name not in NEVER_READ and path.is_file():
            with data_only():
                torch.load(path, map_location="meta")


def _classes() -> list[Any]:
    """Those of `CLASSES` that the installed DeepSpeed has."""
    found: list[Any] = []
    if find_spec("deepspeed") is None:
        return found
    for name in CLASSES:
        module, _, attribute = name.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute, None))
    # Some versions of Python (3.11.2) pickle the member of an Enum as a call of getattr.
    return [*(entry for entry in found if entry is not None), (_enum_member, "builtins.getattr")]


def _enum_member(kind: Any, name: Any) -> Enum:
    """What stands for `getattr` in a file: the member of an Enum, and nothing else.

    Raises:
        pickle.UnpicklingError: anything else is asked for.
    """
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"Unsupported: getattr({kind!r}, {name!r}) is no member of an Enum")


def _reason(error: Exception) -> str:
    """What torch found in the file, out of its advice on how to load it nevertheless."""
    told = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return (told or str(error).splitlines())[0][:200]
