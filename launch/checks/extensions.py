"""DeepSpeed's C++ extensions: the one that training never uses is not built, and no killed build keeps a run waiting.

torch guards each build, and each first use of a finished one, by a file called `lock`, which it keeps open meanwhile.
A process killed in that time leaves the file behind, and every later one waits for it for ever.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator

# A lock that nobody here has open is abandoned after so long. Where the home folder is shared, another host may hold
# it: loading a finished build takes it seconds, and building one less than 5 minutes.
LOADING_SECONDS = 5
BUILDING_SECONDS = 300


def skip_inference_collectives() -> None:
    """Keeps DeepSpeed from building its shared-memory collectives for CPUs, a minute of every first run.

    Tensor-parallel inference alone calls them (`inference_all_reduce`); training on CPUs uses gloo. They would leave
    69 MB per rank in /dev/shm, too. DeepSpeed builds what its table of compatible extensions says; edits to it persist.
    Call it before `init_distributed`.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:  # accelerators have none, and making the table takes seconds
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def remove_abandoned_locks() -> None:
    """Removes the locks of builds whose process was killed, whatever their date: clocks are set, or differ by host."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in root.glob("**/lock"):
        try:
            seconds = abs(time.time() - lock.stat().st_mtime)
            limit = LOADING_SECONDS if any(lock.parent.glob("*.so")) else BUILDING_SECONDS
            if seconds > limit and not _is_open(lock):
                lock.unlink()
                print(f"{lock}: left by a process that was killed while it built or loaded it; removed.", flush=True)
        except FileNotFoundError:
            continue  # released, or removed by another rank


def _is_open(path: Path) -> bool:
    """Whether a process that this user can look into has `path` open; True where that cannot be known (no /proc)."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return True
    wanted = str(path.resolve())
    for descriptor in processes.glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:
            continue  # closed, or its process ended, since the folder was listed
    return False
