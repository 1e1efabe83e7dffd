"""Builds a C++ source into a shared library, once per machine and user, however many processes ask at once.

A library lies under a name that says all it depends on: source, flags, compiler, torch's version, CPU. So nothing gets
stale, and machines that share a home do not get each other's instructions. It is written beside its place and moved
there. Who builds holds a lock that ends with the process; who waits for it longer than `LIMIT` seconds, or cannot write
there, builds a copy of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LIMIT = 120.0  # seconds, for a compiler that takes 3
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")  # where there are such vectors; a fifth faster than in halves


def load_library(source: Path) -> ctypes.CDLL:
    """The library of a source, built if there is none yet.

    Raises:
        ValueError: the compiler is missing, fails, or takes too long.
    """
    compiler = os.environ.get("CXX", "g++")
    target = cache_folder() / f"{source.stem}-{_key(source, compiler)}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                    os.replace(_compile(compiler, source, Path(folder)), target)
            return ctypes.CDLL(str(target))
    except OSError:  # no home, a full disk, a read-only or noexec one, a lock that never comes free
        with tempfile.TemporaryDirectory(prefix="ds_moelora_") as folder:
            return ctypes.CDLL(str(_compile(compiler, source, Path(folder))))


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "ds_moelora" / "kernels"


def _key(source: Path, compiler: str) -> str:
    key = hashlib.sha256(source.read_bytes())
    for part in (compiler, *FLAGS, torch.__version__, platform.machine(), *_cpu()):
        key.update(part.encode() + b"\0")
    return key.hexdigest()[:32]


def _cpu() -> list[str]:
    """What /proc/cpuinfo says of the first CPU's kind and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor(), platform.node()]
    return [line for line in lines if line.split("\t")[0] in ("model", "model name", "flags", "Features", "CPU part")]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, which the system takes back when the process ends.

    Raises:
        OSError: another process has held it for `LIMIT` seconds, or the file cannot be locked.
    """
    with path.open("w") as file:
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


def _compile(compiler: str, source: Path, folder: Path) -> Path:
    target = folder / "built.so"
    command = [compiler, *FLAGS, str(source), "-o", str(target)]
    try:
        built = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        problem = built.stderr[-800:] if built.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f'kernels "cpp" need GCC, and the compiler {compiler!r} did not build {source.name}: {problem} '
            'Install g++ (or name it in the environment variable CXX), or set "kernels": "torch".'
        )
    return target
