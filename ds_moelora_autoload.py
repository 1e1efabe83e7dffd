"""Imports ds_moelora when somebody asks for it by name: an optimizer of `torch.optim`, or PEFT's adapter type MOELORA.

torch (2.5 and newer) calls the entry points of the group "torch.backends" at the end of `import torch`, this one
among them (setup.py). It imports nothing, and leaves two look-ups behind that act on our names alone:

    torch.optim.GateRiemannianAdamW        which DeepSpeed resolves from "optimizer": {"type": NAME}
    PEFT's table of configurations         which every loader of a saved adapter asks by the file's `peft_type`

Off with DS_MOELORA_AUTOLOAD=0, or with torch's TORCH_DEVICE_BACKEND_AUTOLOAD=0. A failure here is logged and never
raised: it would break `import torch`. The module stands beside the package, whose import costs seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys

OPTIMIZERS = ("GateRiemannianAdamW", "GateRiemannianSGD", "GateRiemannianMuon")
PEFT_TYPE = "MOELORA"
_TABLE = "peft.mapping"


def autoload() -> None:
    """The entry point."""
    try:
        if os.environ.get("DS_MOELORA_AUTOLOAD", "1") == "1":
            _watch_optimizers(sys.modules["torch.optim"])
            if _TABLE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder())
    except Exception:
        _log()


def _log() -> None:
    logging.getLogger("ds_moelora").warning("ds_moelora is not found by name here; import it.", exc_info=True)


def _is_imported() -> bool:
    return "ds_moelora" in sys.modules  # also while its own import asks for these names


def _watch_optimizers(optim) -> None:
    others = getattr(optim, "__getattr__", None)
    if getattr(others, "__module__", None) == __name__:
        return

    def find(name):
        if name in OPTIMIZERS and not _is_imported():
            import ds_moelora  # noqa: F401  puts them there

            return vars(optim)[name]
        if others is not None:
            return others(name)
        raise AttributeError(f"module {optim.__name__!r} has no attribute {name!r}", name=name, obj=optim)

    optim.__getattr__ = find


class _Finder:
    """Waits for `peft.mapping` in `sys.meta_path`, and goes when it comes."""

    def find_spec(self, name, path=None, target=None):
        if name != _TABLE:
            return None
        try:
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _watch_types(module)

            spec.loader.exec_module = exec_module
        except Exception:
            _log()
            return None  # the others find it
        return spec


def _watch_types(module) -> None:
    try:
        module.PEFT_TYPE_TO_CONFIG_MAPPING = _Types(module.PEFT_TYPE_TO_CONFIG_MAPPING)
    except Exception:
        _log()


class _Types(dict):
    """PEFT's table; a file's `peft_type` may say more behind our type's name."""

    def __missing__(self, kind):
        if isinstance(kind, str) and kind.partition(" ")[0] == PEFT_TYPE and not _is_imported():
            import ds_moelora  # noqa: F401  enters the type
            from ds_moelora.tuner.files.loading import LoadUnderWay

            if kind in self:
                return LoadUnderWay if sys._getframe(1).f_globals["__name__"] == "peft.peft_model" else self[kind]
        raise KeyError(kind)
