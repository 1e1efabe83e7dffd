"""Processes that start with everything imported.

One server process imports `tests.support.preload` and forks all others (the "forkserver" of multiprocessing). A process
is as new as one that was started by itself, but for its imports: it has its own memory, session, environment and exit
code. Variables that libraries read while they are imported (HF_HOME, DS_ACCELERATOR) are the server's.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing as mp
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLONE_NEWNET = 0x40000000
_context = mp.get_context("forkserver")


@dataclass(frozen=True)
class Host:
    """One of several hosts of a run: a network namespace of this machine.

    Args:
        network: the namespace's name. first: the number of its first rank. world: ranks of all hosts together.
        address: of rank 0's host.
    """

    network: str
    first: int
    world: int
    address: str

    def enter(self) -> None:
        """Puts this process, and those that it starts, on the host."""
        namespace = os.open(f"/run/netns/{self.network}", os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
        if libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {self.network}")
        os.close(namespace)


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


def run_ranks(
    script: str,
    arguments: list[str],
    ranks: int,
    environment: dict[str, str],
    port: int,
    output: str,
    host: Host | None = None,
) -> None:
    """Does in a forked process what `deepspeed --num_gpus <ranks> <script> <arguments>` does on one machine.

    With `host`, what `deepspeed --no_ssh --node_rank` does on one of several. A rank that fails ends the others, and
    its code becomes this process's. All are one session; what they print is added to the file `output`, and their
    process numbers are in `<output>.pids`, by rank.
    """
    os.setsid()
    if host is not None:
        host.enter()
    first, world, address = (host.first, host.world, host.address) if host else (0, ranks, "127.0.0.1")
    processes = []
    for rank in range(ranks):
        own = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        own |= {"RANK": str(first + rank), "LOCAL_RANK": str(rank)}
        words = [f"--local_rank={rank}", *arguments]
        process = mp.get_context("fork").Process(target=run_script, args=(script, words, environment | own, output))
        process.start()
        processes.append(process)
    pids = Path(f"{output}.pids")
    pids.with_suffix(".new").write_text("\n".join(str(process.pid) for process in processes))
    pids.with_suffix(".new").rename(pids)
    code, running = 0, list(processes)
    while running and code == 0:
        wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            code = code or process.exitcode or 0
    for process in running:
        process.terminate()
    for process in running:
        process.join(timeout=40)
        process.kill()
        process.join()
    sys.exit(code)


def run_script(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """As `python -u <script> <arguments>` in the repository's root, with this environment and nothing of another."""
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
    # After a fork torch makes its thread pool anew at the next call: here, since of two threads at once (transformers
    # loads weights with several) one would meet no pool.
    import torch

    torch.set_num_threads(torch.get_num_threads())
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
