"""DeepSpeed's own checkpoints are data: nothing that their files say is executed, and a cut file is named.

torch's files are pickles, and a pickle can call anything. DeepSpeed 0.19.8 reads its engine files with
`torch.load(weights_only=False)`, although they hold no more than tensors, numbers and objects of the few classes in
`CLASSES`. torch has a switch for this, the variable TORCH_FORCE_WEIGHTS_ONLY_LOAD: its restricted unpickler builds
tensors, plain values and registered classes, and refuses everything else.
"""

from __future__ import annotations

import importlib
import os
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
SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def data_only() -> Iterator[None]:
    """Inside, `engine.load_checkpoint(folder)` reads data alone.

        with ds_moelora.data_only():
            engine.load_checkpoint(folder)

    Sets torch's own switch `TORCH_FORCE_WEIGHTS_ONLY_LOAD`, which holds every `torch.load` of the process to
    `weights_only=True`, and takes it back at the end; no function is replaced.

    Raises:
        ValueError: from inside, naming the file: it holds more than data.
    """
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with torch.serialization.safe_globals(_classes()):
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(_file_of(error), error)) from error
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def check_data_only(folder: str | Path) -> None:
    """Looks through torch's files in a folder, without reading the tensors' values.

    Args:
        folder: a checkpoint of DeepSpeed or a model; files in folders below it are looked at, too.

    Raises:
        ValueError: naming the first file that holds more than data, with what it would have called, or that is cut.
    """
    with torch.serialization.safe_globals(_classes()):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in SUFFIXES and path.name not in NEVER_READ and path.is_file():
                try:
                    torch.load(path, map_location="meta", weights_only=True)
                except pickle.UnpicklingError as error:
                    raise ValueError(_refusal(path, error)) from error
                except (RuntimeError, EOFError, OSError) as error:  # torch's, of an archive whose end is missing
                    raise ValueError(
                        f"{path} is incomplete or cannot be read ({path.stat().st_size} bytes; {error!s:.100}). The "
                        "save was probably interrupted: use the checkpoint before it."
                    ) from error


def _classes() -> list[Any]:
    """Those of `CLASSES` that the installed DeepSpeed has."""
    found: list[Any] = []
    if find_spec("deepspeed") is not None:
        for name in CLASSES:
            module, _, attribute = name.rpartition(".")
            found.append(getattr(importlib.import_module(module), attribute, None))
    # Some versions of Python (3.11.2) pickle the member of an Enum as a call of getattr.
    return [*filter(None, found), (_enum_member, "builtins.getattr")]


def _enum_member(kind: Any, name: Any) -> Enum:
    """What stands for `getattr` in a file: the member of an Enum, and nothing else.

    Raises:
        pickle.UnpicklingError: anything else is asked for.
    """
    if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"Unsupported: getattr({kind!r}, {name!r}) is no member of an Enum")


def _file_of(error: BaseException) -> str:
    """The file that `torch.load` was reading: its argument, in the frames that the error came through."""
    trace, found = error.__traceback__, "a file of the checkpoint"
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "load" and frame.f_globals.get("__name__") == "torch.serialization":
            found = str(frame.f_locals.get("f", found))
        trace = trace.tb_next
    return found


def _refusal(path: str | Path, error: Exception) -> str:
    """Names what torch found in the file, without its advice on how to load it nevertheless."""
    told = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return f"{path} holds more than data, and was not loaded ({(told or str(error).splitlines())[0][:200]})."
