"""What DeepSpeed's compiled CPU collectives leave on a machine: the lock of their build, and shared memory.

torch guards each build, and each first use of a finished one, by a file called `lock`, which it keeps open meanwhile.
A process killed in that time leaves the file behind, and every later run on the machine waits for it for ever.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from launch.checks.errors import UserError

# An abandoned lock is told by nobody having it open. That sees this machine alone: where the home folder is shared, a
# build may be running on another, and none takes longer than the second limit.
ABANDONED_MINUTES = 5
STALE_MINUTES = 30
AHEAD_MINUTES = 1  # by which clocks of hosts that share a folder may differ
LOADING_SECONDS = 5  # what loading a finished build takes at most
SHARED_MEMORY = Path("/dev/shm")


def load_collectives() -> None:
    """Loads DeepSpeed's CPU collectives, compiling them on the first run, so that a kill leaves no lock behind.

    The launcher ends this process with SIGTERM as soon as another rank has failed. Raised as an exception it lets torch
    remove its lock. Only here, and not while torch.distributed opens: that waits in C++, where the exception would have
    to wait too. What is loaded here is not built, or locked, again there.
    """
    builder = _collectives()
    if builder is None:
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        builder.load()
    finally:
        signal.signal(signal.SIGTERM, previous)


def unlink_buffers() -> None:
    """Takes away the names of the collectives' shared memory (69 MB per rank) once every rank has mapped it.

    DeepSpeed itself never removes them: each run would leave its buffers in /dev/shm, which is memory, until the
    machine restarts, and a later run on the same port could take them for its own. A mapping outlives its name, so
    that the memory is given back when the last rank ends, in whatever way. Call it after `init_distributed`.
    """
    if _collectives() is None:
        return
    deepspeed.comm.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{deepspeed.comm.get_rank()}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def find_free_port() -> int:
    """A TCP port that nobody on this machine uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collectives() -> Any:
    """The builder of DeepSpeed's CPU collectives; None on an accelerator, which has its own."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return None
    return builder


def check_build_lock() -> None:
    """Finds a lock that a killed process left behind, and removes it where nothing is being built.

    So a run that is restarted after a rank was killed in its first seconds does not wait for that rank's lock.

    Raises:
        UserError: a lock that nobody holds, or older than any build takes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    for lock in root.glob("**/lock"):
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:
            continue  # a build that is running right now has just finished
        if minutes < -AHEAD_MINUTES:  # a clock that was ahead, or was set back: the date says nothing, the owner does
            minutes = math.inf if not _is_open(lock) else 0.0
        if minutes > LOADING_SECONDS / 60 and any(lock.parent.glob("*.so")) and not _is_open(lock):
            # Should the holder live where this process cannot see it, both load the same finished file.
            print(f"{lock}: left by a process that was killed while it loaded the extension; removed.", flush=True)
            lock.unlink(missing_ok=True)
            continue
        if minutes > STALE_MINUTES or (minutes > ABANDONED_MINUTES and not _is_open(lock)):
            age = "dated in the future" if math.isinf(minutes) else f"{minutes:.0f} minutes old"
            raise UserError(
                f"{lock} is {age}: a process "
                "was killed while it built or loaded an extension of DeepSpeed, and every later one waits for it. "
                "Remove that file."
            )


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
