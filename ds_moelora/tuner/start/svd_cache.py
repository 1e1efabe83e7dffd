"""Decompositions on disk: one safetensors file per weight and choice of triplets."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...mixture.svd import Triplets

# Part of every file's name: a change of algorithm that changes values makes older files stay unread.
VERSION = 1


def cached_triplets(
    folder: str | None, weight_hash: Tensor, indices: Tensor, compute: Callable[[], Triplets]
) -> Triplets:
    """`compute()`, or what it returned the last time for this weight and these triplets.

    The file does not depend on s, rho or eta, which come afterwards. It is written beside its place and moved there, so
    that runs that share a folder never read half a file.

    Args:
        folder: made if it is not there; None: nothing is kept.
        weight_hash: of the weight. indices: numbers of the triplets.

    Raises:
        ValueError: a file that cannot be read.
    """
    if folder is None:
        return compute()
    key = hashlib.sha256()
    for part in (weight_hash, indices):
        key.update(part.cpu().contiguous().numpy().tobytes())
    path = Path(folder) / f"svd{VERSION}-{key.hexdigest()[:40]}.safetensors"
    if path.is_file():
        try:
            found = load_file(path)
            return Triplets(found["U"], found["S"], found["V"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"svd_cache_dir: {path} cannot be read ({error}); delete it.") from error
    triplets = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: value.cpu().contiguous() for name, value in triplets._asdict().items()}, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return triplets
