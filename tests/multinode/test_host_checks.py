"""What launch/multinode.sh says about hosts that are not as they should be, before anything starts."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.multinode.network import INTERFACE, Host, TwoHosts
from tests.multinode.runs import Workplace

pytestmark = pytest.mark.dist


def check(
    net: TwoHosts, place: Workplace, *flags: str, hostfile: str = "host-a slots=1\nhost-b slots=1\n", **variables: str
) -> tuple[int, str]:
    """`multinode.sh --check_only` on the first host, with its launcher's ssh."""
    path = place.folder / "hosts to check"
    path.write_text(hostfile)
    command = ["bash", "launch/multinode.sh", "--hostfile", str(path), "--launcher", "ssh", "--check_only", *flags,
               "launch/train.py"]  # fmt: skip
    return net.hosts[0].run(command, {**place.environment, **variables}, 120, place.copy)


@pytest.fixture
def known_hosts(net: TwoHosts) -> Iterator[Path]:
    """The user's known_hosts, put back afterwards."""
    text = net.known_hosts.read_text()
    yield net.known_hosts
    net.known_hosts.write_text(text)


def test_nothing_amiss(net: TwoHosts, place: Workplace):
    code, output = check(net, place)
    assert (code, output) == (0, "multinode: 2 hosts, 2 ranks, ssh: nothing found amiss.\n")


def test_all_problems_are_collected(net: TwoHosts, place: Workplace):
    """Two hosts with different faults, and one that is not there."""
    listener = net.hosts[0].start([sys.executable, "-m", "http.server", "29500"])
    assert_listening(net)
    hostfile = "host-a slots=1\nhost-b slots=1\nhost-c slots=1\n"
    try:
        code, output = check(net, place, hostfile=hostfile, GLOO_SOCKET_IFNAME="eth7")
    finally:
        net.hosts[0].kill_all()
        listener.communicate()
    assert code == 1
    assert "host-a: port 29500 cannot be used: [Errno 98] Address already in use; choose another" in output
    for host in ("host-a", "host-b"):
        assert f"{host}: GLOO_SOCKET_IFNAME=eth7: it has no such interface, but lo, {INTERFACE}" in output
    assert "host-c: ssh: ssh: Could not resolve hostname host-c" in output
    assert "neither DNS nor /etc/hosts" in output
    assert output.endswith("4 to put right; nothing was started.\n")


def assert_listening(net: TwoHosts) -> None:
    for _ in range(100):
        if "29500" in net.hosts[0].run(["ss", "-ltn"])[1]:
            return
        time.sleep(0.1)
    raise AssertionError("the port is not taken")


def test_unknown_and_changed_host_keys(net: TwoHosts, place: Workplace, known_hosts: Path):
    lines = known_hosts.read_text().splitlines(keepends=True)
    known_hosts.write_text(lines[0])
    code, output = check(net, place)
    assert code == 1
    assert "host-b: ssh: " in output
    assert "Host key verification failed" in output
    assert "--accept_new_host_keys" in output
    assert known_hosts.read_text() == lines[0], "nothing is taken unseen"

    assert check(net, place, "--accept-new-host-keys")[0] == 0
    assert known_hosts.read_text() != lines[0]

    # host-b answers with another key than the one known: the flag does not help.
    known_hosts.write_text(lines[0] + f"host-b,10.77.0.2 {lines[0].split(' ', 1)[1]}")
    code, output = check(net, place, "--accept-new-host-keys")
    assert code == 1
    assert "host-b: ssh: " in output
    assert "Host key verification failed" in output


def test_no_key_of_this_user(net: TwoHosts, place: Workplace):
    key = net.folder / "home" / "id_ed25519"
    key.rename(key.with_suffix(".away"))
    try:
        code, output = check(net, place)
    finally:
        key.with_suffix(".away").rename(key)
    assert code == 1
    for host in ("host-a", "host-b"):
        assert f"`ssh-copy-id {host}`" in output


def test_a_host_off_the_network(net: TwoHosts, place: Workplace):
    net.hosts[1].drop()
    try:
        code, output = check(net, place, "--connect_timeout", "1")
    finally:
        net.hosts[1].join()
    assert code == 1
    assert "host-b: ssh: ssh: connect to host host-b port 22:" in output
    assert "host-a: " not in output


def test_a_firewalled_master(net: TwoHosts, place: Workplace):
    """host-b reaches host-a by ssh, but not at the address that it is told."""
    code, output = check(net, place, "--master_addr", "127.0.0.1")
    assert code == 1
    assert "host-b: no connection to the master, 127.0.0.1 port 29500: [Errno 111] Connection refused" in output


def test_another_environment(net: TwoHosts, place: Workplace, tmp_path: Path):
    """host-b has another version of peft and other sources."""
    site, launch = tmp_path / "site", tmp_path / "launch"
    (site / "peft-9.9.dist-info").mkdir(parents=True)
    (site / "peft-9.9.dist-info" / "METADATA").write_text("Name: peft\nVersion: 9.9\n")
    shutil.copytree(place.copy / "launch", launch)
    with (launch / "train.py").open("a") as file:
        file.write("# another state\n")
    here = tmp_path / "here"
    here.mkdir()
    with mounted(net.hosts[1], site, here), mounted(net.hosts[1], launch, place.copy / "launch"):
        code, output = check(net, place, PYTHONPATH=str(here))
    assert code == 1
    assert "host-b: peft 9.9, but 0." in output
    assert f"host-b: ds_moelora in {place.copy} is " in output
    assert "bring the copies to one state" in output
    assert output.endswith("2 to put right; nothing was started.\n")


def test_another_file_system(net: TwoHosts, place: Workplace, tmp_path: Path):
    with mounted(net.hosts[1], tmp_path, place.folder):
        code, output = check(net, place)
    assert code == 1
    assert output.endswith("2 to put right; nothing was started.\n")
    for path in (place.copy, place.copy / "launch" / "train.py"):
        assert f"host-b: {path} is not there; a shared file system, or a copy at the same path" in output
    assert "host-a: " not in output


def test_no_interpreter(net: TwoHosts, place: Workplace, tmp_path: Path):
    with mounted(net.hosts[1], tmp_path, Path(sys.prefix)):
        code, output = check(net, place)
    assert code == 1
    assert f"host-b: {Path(sys.prefix, 'bin')}/python" in output
    assert "cannot be run there" in output


def test_two_names_of_one_machine(net: TwoHosts, place: Workplace):
    assert net.hosts[1].run(["hostname", "host-a"]) == (0, "")
    try:
        code, output = check(net, place)
    finally:
        net.hosts[1].run(["hostname", "host-b"])
    assert code == 1
    assert "host-b: calls itself host-a, as host-a does" in output


@contextmanager
def mounted(host: Host, source: Path, target: Path) -> Iterator[None]:
    """On `host` alone, `target` shows `source`."""
    assert host.run(["mount", "--bind", str(source), str(target)]) == (0, "")
    try:
        yield
    finally:
        assert host.run(["umount", str(target)]) == (0, "")
