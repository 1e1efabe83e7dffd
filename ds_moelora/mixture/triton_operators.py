"""Operators that are one Triton kernel each, which compilers, FakeTensors and counters see; on CPUs torch does them."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion

OLDEST_TRITON = "3.4"  # the oldest whose compiler took the kernels (benchmarks/kernel_resources.py)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on CPUs
_LIBRARY = torch.library.Library("ds_moelora", "FRAGMENT")


def why_no_triton() -> str | None:
    """What is wrong with the installed Triton; None: nothing."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install 'ds_moelora[triton]')"
    if TorchVersion(version) < OLDEST_TRITON:
        return f"Triton {version} is older than {OLDEST_TRITON} (pip install -U triton, or a torch that brings it)"
    return None


NO_TRITON = why_no_triton()  # None: there is one, imported where a kernel is launched


def operator(schema: str, launch: Callable[..., None], in_torch: Callable[..., None] | None = None) -> None:
    """Defines an operator without results.

    Args:
        launch: starts its kernel, on CUDA devices and in Triton's interpreter. in_torch: the same on CPUs, if anything.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def launched(*args: Any) -> None:
        with torch._C.DisableTorchFunction():
            launch(*args)

    _LIBRARY.impl(name, launched, "CUDA")
    on_cpu = launched if INTERPRETED else in_torch
    if on_cpu is not None:
        _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"ds_moelora::{name}", lambda *_: None, lib=_LIBRARY)
