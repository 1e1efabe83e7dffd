"""What names a process among those of all hosts, and whether it still runs."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """What names this process among those of all hosts."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "pids": namespace("pid"),  # process numbers mean nothing in another container
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
    }


def is_here(process: dict[str, Any]) -> bool:
    """Whether a process is, or was, one of this machine and process namespace."""
    me = identity()
    return me["boot"] is not None and all(process.get(name) == me[name] for name in ("host", "boot", "pids"))


def is_gone(process: dict[str, Any]) -> bool:
    """Whether a process provably does not run any more."""
    pid = process.get("pid")
    return is_here(process) and isinstance(pid, int) and start_time(pid) != process.get("started")


def kill(process: dict[str, Any]) -> None:
    """Ends a process of this machine, if its number is still its own."""
    if is_here(process) and process["started"] is not None and not is_gone(process):
        with suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile, or is not ours
            os.kill(process["pid"], signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When a process began, in clock ticks since the boot; None if it does not run, or without /proc."""
    text = _text(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def namespace(kind: str) -> str | None:
    """This process's namespace of that kind; None without /proc."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return None


def find_free_port() -> int:
    """A TCP port that nobody on this machine uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
