"""A host drops off the network in the midst of a run: two hosts made of Linux network namespaces, one rank on each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.failures import (
    BATCH,
    ForkedRun,
    Setting,
    errors_in,
    undisturbed_run,
    wait_for_step,
)
from tests.support.forks import Host

pytestmark = pytest.mark.dist

LOST_RANK_SECONDS = 6
LIMIT = 300.0  # seconds from a fault until every process is gone: a hang, whatever the machine


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return undisturbed_run(tmp_path_factory.getbasetemp())


@dataclass
class Hosts:
    """Two network namespaces and the cable between them."""

    names: list[str]
    interfaces: list[str]
    addresses: list[str]


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("needs the ip command (apt-get install iproute2)")
    tag = f"{os.getpid() % 100000}"
    made = Hosts([f"fail{tag}a", f"fail{tag}b"], [f"vf{tag}a", f"vf{tag}b"], ["10.213.7.1", "10.213.7.2"])
    added = ip("netns", "add", made.names[0])
    if added.returncode:
        pytest.skip(f"needs the right to make network namespaces (root): {added.stderr.strip()}")
    try:
        ip("netns", "add", made.names[1])
        cable = ip("link", "add", made.interfaces[0], "type", "veth", "peer", "name", made.interfaces[1])
        if cable.returncode:
            pytest.skip(f"needs the right to make veth interfaces: {cable.stderr.strip()}")
        for name, interface, address in zip(made.names, made.interfaces, made.addresses, strict=True):
            ip("link", "set", interface, "netns", name)
            for words in (["addr", "add", f"{address}/24", "dev", interface], ["link", "set", interface, "up"]):
                assert ip("-n", name, *words).returncode == 0
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in made.names:
            ip("netns", "del", name)


def test_a_host_drops_off(
    setting: Setting,
    hosts: Hosts,
    tmp_path: Path,
    report: Callable[[str, str], None],
) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(setting.reference / "checkpoint-2", output_dir / "checkpoint-2")
    arguments = [*setting.arguments, *BATCH, "--output_dir", str(output_dir)]
    patience = ["--lost_rank_seconds", str(LOST_RANK_SECONDS)]
    runs = []
    for number, name in enumerate(hosts.names):
        environment = {"GLOO_SOCKET_IFNAME": hosts.interfaces[number]}
        log, host = tmp_path / f"host-{number}.log", Host(name, number, 2, hosts.addresses[0])
        runs.append(ForkedRun([*arguments, *patience], log, environment, ranks=1, port=29500, host=host))
    try:
        wait_for_step(runs[0], 5)
        assert ip("-n", hosts.names[1], "link", "set", hosts.interfaces[1], "down").returncode == 0
        since = time.monotonic()
        codes = [run.finish(timeout=LIMIT) for run in runs]
        seconds = time.monotonic() - since
    finally:
        for run in runs:
            run.end()
    for number, run in enumerate(runs):
        assert codes[number] != 0, run.output[-4000:]
        said = errors_in(run.output).get(str(number), "")
        lost = rf"rank {1 - number} \(\S+, pid \d+\) was lost: no sign of its host for {LOST_RANK_SECONDS} s"
        assert re.search(lost, said), run.output[-4000:]
    message = errors_in(runs[0].output)["0"]
    report(
        "failures",
        f"| a host drops off the network (--lost_rank_seconds {LOST_RANK_SECONDS}) | {seconds:.1f} s | {codes[0]} "
        f"| [rank 0] error: {message} | |",
    )
