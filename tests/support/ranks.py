"""Real ranks for tests: forked processes that join one gloo group over a file store, and then run many cases.

A case is a module-level function; every rank calls it with the same arguments and its return value comes back, by
rank. An exception on any rank, or a time-out, kills the ranks and fails the test with every rank's traceback.
"""

from __future__ import annotations

import atexit
import importlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.support.forks import start_forked

# accelerate asks for them, though the group is there already; nothing listens.
UNUSED = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
_pools: dict[int, RankPool] = {}


class RankPool:
    """`world` processes on this machine."""

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = Pipe()
            self.processes.append(start_forked(_serve, rank, world, f"{self.folder.name}/store", theirs))
            theirs.close()
            self.pipes.append(ours)

    def run(self, function: Callable[..., Any], kwargs: dict[str, Any], timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, kwargs))
        results: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        failed_at: float | None = None
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            # Once a rank has failed, the others have a moment to tell why they fail too.
            limit = deadline if failed_at is None else min(deadline, failed_at + 2)
            ready = wait(waiting, timeout=max(limit - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = ("error", "the process died")
                if results[rank][0] == "error":
                    failed_at = failed_at or time.monotonic()
        errors = [f"--- rank {rank}\n{value}" for rank, (kind, value) in results.items() if kind == "error"]
        silent = [rank for rank in range(len(self.pipes)) if rank not in results]
        if errors or silent:
            self.close()
            hung = f"\nranks {silent} gave no answer (time-out {timeout:.0f} s)" if silent else ""
            raise AssertionError("\n".join(errors) + hung)
        return [results[rank][1] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()
        for world in [w for w, pool in _pools.items() if pool is self]:
            del _pools[world]


def run_on_ranks(world: int, function: Callable[..., Any], timeout: float = 600, **kwargs: Any) -> list[Any]:
    """Calls `function(**kwargs)` on `world` ranks of one process group; returns the results by rank."""
    if world not in _pools:
        _pools[world] = RankPool(world)
    return _pools[world].run(function, kwargs, timeout)


def close_pool(world: int) -> None:
    """Ends the processes of a pool that later tests do not need."""
    if world in _pools:
        _pools[world].close()


@atexit.register
def close_pools() -> None:
    for pool in list(_pools.values()):
        pool.close()


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", **UNUSED
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            module, name, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            function = getattr(importlib.import_module(module), name)
            pipe.send(("result", function(**kwargs)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
