"""Threads of a process, also of one among several on a machine. Imported before torch, which reads the variable once.

Unset, every process starts a thread per core, and each parallel loop waits for threads that another process keeps from
running. torchrun sets one thread; DeepSpeed's launcher sets none (but for --bind_cores_to_rank), nor does mpirun;
accelerate sets them late, and warns.
"""

from __future__ import annotations

import os

import psutil

VARIABLE = "OMP_NUM_THREADS"
# The number of processes on this machine, as DeepSpeed's launcher, torchrun, Open MPI and MPICH tell it.
LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def share_cores() -> None:
    """Sets `OMP_NUM_THREADS` to this process's share of the cores that it may use, at least 1, unless it is set."""
    told = [os.environ[name] for name in LOCAL_SIZES if os.environ.get(name, "").isdecimal()]
    processes = max(int(told[0]), 1) if told else 1
    usable = len(os.sched_getaffinity(0))
    cores = min(usable, psutil.cpu_count(logical=False) or usable)
    os.environ.setdefault(VARIABLE, str(max(cores // processes, 1)))


share_cores()
