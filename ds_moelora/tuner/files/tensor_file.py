"""Adding tensors to a safetensors file one at a time, so that they need never be in memory together.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets
in what follows; "__metadata__"), and the tensors' bytes behind each other (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def append_tensors(
    path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> None:
    """Replaces a file by one that has further tensors; the old one stays until the new one is complete.

    Args:
        path: a safetensors file.
        specs: name -> (dtype, shape) of the tensors to add.
        tensors: these tensors in the same order, each asked for when the one before it is written.

    Raises:
        ValueError: a tensor is not as announced, or not finite. OSError: the disk is full, and the like.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path.open("rb") as old, partial.open("wb") as new:
            header = _read_header(old)
            body = os.fstat(old.fileno()).st_size - old.tell()
            offset = body
            for name, (dtype, shape) in specs.items():
                size = math.prod(shape) * dtype.itemsize
                header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
                offset += size
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, new)
            for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
                if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}.")
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"{name} is not finite (NaN or infinity): such an adapter is not saved.")
                new.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            new.flush()
            os.fsync(new.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_header(file: IO[bytes]) -> dict[str, object]:
    """Leaves `file` where the tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length))
