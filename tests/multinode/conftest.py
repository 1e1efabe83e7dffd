"""The two hosts, and a copy of the repository whose path no careless shell line survives."""

from __future__ import annotations

import compileall
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.network import INTERFACE, TwoHosts, missing, two_hosts
from tests.multinode.runs import Workplace
from tests.support.launch_support import ROOT, alpaca_rows, tiny_model, write_jsonl


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    reason = missing()
    if reason is not None:
        pytest.skip(f"two hosts: {reason}")
    with two_hosts(tmp_path_factory.mktemp("net") / "two hosts") as hosts:
        yield hosts


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Both hosts share this file system: a model, data, host files, and the copy of the repository."""
    folder = tmp_path_factory.mktemp("place")
    copy = folder / 'it\'s a "copy" of $HOME; `id`'
    for name in ("launch", "ds_moelora", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(copy, quiet=1)  # or every rank of every run would, where writing bytecode is off
    tiny_model(folder / "model")
    write_jsonl(folder / "rows.jsonl", alpaca_rows(24))
    for slots in (1, 2):
        (folder / f"hosts{slots}").write_text(f"# both\nhost-a slots={slots}\nhost-b slots={slots}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
        "PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # Open MPI refuses root otherwise.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return Workplace(folder, copy, environment)
