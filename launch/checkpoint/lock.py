"""One run a folder: a lock file that says who writes there, on this host or another.

The file is linked into its place in one act (a rename or an open with O_EXCL is not one on every NFS), and its time is
set anew every `BEAT_SECONDS`. It is taken over only when its owner is provably gone: the same host and boot, and no
process of that number and start time. The owner on another host may be cut off and alive: then only a person can tell.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from launch.checks.errors import UserError
from launch.cluster.processes import identity, is_gone, is_here

NAME = ".lock"
BEAT_SECONDS = 30.0
ATTEMPTS = 5


class OutputLock:
    """Held by process 0 of a run from before its first write to its end.

    Args:
        output_dir: the folder of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / NAME
        self._mine: dict[str, Any] | None = None
        self._ended = threading.Event()

    def take(self) -> None:
        """Takes the lock, or that of a run that has ended, of which a line tells.

        Raises:
            UserError: another run holds it, or may hold it; says who, and what to do.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = {**identity(), "id": uuid.uuid4().hex, "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        own = self.path.with_name(f"{NAME}.{mine['id']}")
        try:
            own.write_text(json.dumps(mine))
            _take(self.path, own, self.path)
        finally:
            own.unlink(missing_ok=True)
        self._mine = mine
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Gives the folder free, if it is still this run's."""
        self._ended.set()
        mine, self._mine = self._mine, None
        if mine is not None and (read(self.path) or {}).get("id") == mine["id"]:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a server that is away for a while, or somebody removed the lock by hand


def read(path: Path) -> dict[str, Any] | None:
    """What a lock says; {} if that is nothing; None without a lock."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _take(path: Path, own: Path, lock: Path) -> None:
    """Puts the text of `own` at `path`: where nothing is, or where a run that is gone has left its own.

    Of several runs that find the same dead owner, the one that replaces it holds a claim on just that owner: a lock
    like any other, beside this one. The lock itself is never away.
    """
    for _ in range(ATTEMPTS):
        if _place(own, path):
            return
        holder = read(path)
        if holder is None:
            continue  # released meanwhile
        if not is_gone(holder):
            raise UserError(_refusal(lock, holder))
        claim = lock.with_name(f"{NAME}.gone-{hashlib.sha256(json.dumps(holder).encode()).hexdigest()[:16]}")
        _take(claim, own, lock)
        try:
            if read(path) == holder:  # nobody but the claim's owner replaces it now
                _replace(own, path)
                print(f"{path}: its run ({_describe(holder)}) is gone; the folder is taken over.", flush=True)
                return
        finally:
            claim.unlink(missing_ok=True)
    raise UserError(f"{lock} is taken by another run each time that it is free; start again.")


def _replace(source: Path, target: Path) -> None:
    """Another file under `target` in one act; `source` stays."""
    copy = target.with_name(f"{source.name}.new")
    copy.write_text(source.read_text())
    copy.replace(target)


def _place(source: Path, target: Path) -> bool:
    """Gives a complete file a second name, unless something has that name."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with target.open("x") as file:
                file.write(source.read_text())
        except FileExistsError:
            return False
    return True


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    try:
        seconds = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        seconds = 0.0
    sign = f"last sign {seconds:.0f} s ago" if seconds >= 0 else "its clock is ahead"
    remedy = (
        "Wait for it, end it, or choose another --output_dir."
        if is_here(holder)
        else f"Whether it still runs cannot be told from here: look there, and if it does not, remove {path}."
    )
    return f"--output_dir {path.parent} is in use by another run ({_describe(holder)}, {sign}). {remedy}"


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"
