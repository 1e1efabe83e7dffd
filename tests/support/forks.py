"""Processes that start with everything imported.

One server process imports `tests.support.preload` and forks all others (the "forkserver" of multiprocessing). A process
is as new as one that was started by itself, but for its imports: it has its own memory, session, environment and exit
code. Variables that libraries read while they are imported (HF_HOME, DS_ACCELERATOR) are the server's.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_context = mp.get_context("forkserver")


def start_forked(function: Callable[..., Any], *args: Any, daemon: bool = True) -> ForkServerProcess:
    """Starts a process that calls `function(*args)`, a function of a module.

    Args:
        daemon: ended with this process; it cannot have children of multiprocessing then.
    """
    _start_server()
    process = _context.Process(target=function, args=args, daemon=daemon)
    process.start()
    return process


def _start_server() -> None:
    _context.set_forkserver_preload(["tests.support.preload"])
    path, offline = os.environ.get("PYTHONPATH"), os.environ.get("HF_HUB_OFFLINE")
    os.environ.update(PYTHONPATH=f"{ROOT}{os.pathsep}{path or ''}", HF_HUB_OFFLINE="1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in (("PYTHONPATH", path), ("HF_HUB_OFFLINE", offline)):
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def run_script(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """As `python -u <script> <arguments>` in the repository's root, with this environment and nothing of another.

    Standard output and standard error are added to the file `output`.
    """
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
