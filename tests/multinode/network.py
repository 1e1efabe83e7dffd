"""Two hosts out of Linux namespaces: own network, name, processes, /dev/shm and sshd; one file system.

Each host is a process that `unshare` starts as number 1 of a PID namespace, and everything that runs there is its
descendant. It reads a pipe that this process holds: when the pipe closes, in whatever way this process ends, it ends,
the kernel kills what is left in its PID namespace, and namespaces, mounts and the cable go with it. The machine's own
/etc, ~/.ssh and network are never written to: hosts see other files at those places, by mounts of their own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "mpirun": "openmpi-bin"}
INTERFACE = "veth0"
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")

# Daemons are not on every user's PATH.
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}

# Number 1 of a host. `$1` is its name, `$2` the folder with its files.
BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
mkdir /run/sshd
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
if [ -d ~/.ssh ]; then mount -t tmpfs none ~/.ssh; fi
ip link set lo up
echo ready
read -r _  # the cable is there now
"$3" -f "$2/sshd_config.$1" -E "$2/sshd.$1.log"
echo ready
while read -r _; do :; done
"""


def missing() -> str | None:
    """Why hosts cannot be made here, with the remedy; None if they can."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        return "needs root on Linux"
    packages = sorted({package for program, package in NEEDED.items() if _program(program) is None})
    if packages:
        return f"needs: apt-get install {' '.join(packages)}"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "mount", "-t", "tmpfs",
         "none", "/run"], capture_output=True, text=True)  # fmt: skip
    return None if trial.returncode == 0 else f"namespaces cannot be made here: {trial.stderr.strip()}"


@dataclass
class Host:
    """One host that is up."""

    name: str
    address: str
    pid: int

    def start(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command there as a session of its own; output and errors come in one stream."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        enter += ["env", "-C", str(cwd or Path.cwd())]  # a mount namespace begins at its root
        return subprocess.Popen(
            [*enter, *command],
            env=ENVIRONMENT if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        cwd: Path | None = None,
    ) -> tuple[int, str]:
        """Exit code and output of a command there.

        Raises:
            AssertionError: it did not end in time (everything on this host is killed).
        """
        process = self.start(command, env, cwd)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            output, _ = process.communicate()
            what = f"{self.name}: no end in {timeout} s of {shlex.join(command)[:200]}"
            raise AssertionError(f"{what}\n{output[-6000:]}") from None
        return process.returncode, output

    def processes(self) -> list[str]:
        """Command lines of what runs there, but for sshd that listens and number 1."""
        code, output = self.run(["ps", "-ww", "-eo", "pid=,stat=,args="])
        assert code == 0, output
        lines = [line.split(None, 2) for line in output.splitlines()]
        return [
            args for pid, stat, args in lines
            if pid != "1" and "Z" not in stat and "[listener]" not in args and not args.startswith("ps -ww")
        ]  # fmt: skip

    def kill_all(self) -> None:
        """Kills everything there but number 1 and sshd that listens."""
        others = "ps -ww -eo pid=,args= | grep -v '\\[listener\\]' | awk -v self=$$ '$1 != 1 && $1 != self {print $1}'"
        self.start(["bash", "-c", f"kill -9 $({others}) 2> /dev/null"]).communicate(timeout=20)

    def drop(self) -> None:
        """Takes the host off the network; `join` puts it back."""
        assert self.run(["ip", "link", "set", INTERFACE, "down"]) == (0, "")

    def join(self) -> None:
        assert self.run(["ip", "link", "set", INTERFACE, "up"]) == (0, "")


@dataclass
class TwoHosts:
    """Both hosts, and the folder with their keys and settings (`known_hosts` is the user's)."""

    folder: Path
    hosts: list[Host] = field(default_factory=list)

    @property
    def known_hosts(self) -> Path:
        return self.folder / "home" / "known_hosts"


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Makes the hosts, joined by a cable; takes everything away at the end."""
    _write_files(folder)
    boots: list[subprocess.Popen[str]] = []
    try:
        boots += [_boot(name, folder) for name in NAMES]
        pids = [_first_process(boot) for boot in boots]
        subprocess.run(
            ["ip", "link", "add", INTERFACE, "netns", str(pids[0]), "type", "veth",
             "peer", "name", INTERFACE, "netns", str(pids[1])], check=True, env=ENVIRONMENT)  # fmt: skip
        hosts = [Host(*facts) for facts in zip(NAMES, ADDRESSES, pids, strict=True)]
        for host, boot in zip(hosts, boots, strict=True):
            assert host.run(["ip", "address", "add", f"{host.address}/24", "dev", INTERFACE]) == (0, "")
            host.join()
            _tell(boot, "the cable is there")
        yield TwoHosts(folder, hosts)
    finally:
        for boot in boots:
            boot.stdin.close()  # type: ignore[union-attr]
        for boot in boots:
            try:
                boot.wait(timeout=20)
            except subprocess.TimeoutExpired:
                boot.kill()
                boot.wait()
            boot.stdout.close()  # type: ignore[union-attr]


def _program(name: str) -> str | None:
    return shutil.which(name, path=ENVIRONMENT["PATH"])


def _boot(name: str, folder: Path) -> subprocess.Popen[str]:
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc",
               "bash", "-c", BOOT, "boot", name, str(folder), str(_program("sshd"))]  # fmt: skip
    boot = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=ENVIRONMENT
    )
    _await_ready(boot)
    return boot


def _await_ready(boot: subprocess.Popen[str]) -> None:
    line = boot.stdout.readline()  # type: ignore[union-attr]
    assert line == "ready\n", f"a host did not start: {line!r}, exit code {boot.poll()}"


def _tell(boot: subprocess.Popen[str], text: str) -> None:
    boot.stdin.write(text + "\n")  # type: ignore[union-attr]
    boot.stdin.flush()  # type: ignore[union-attr]
    _await_ready(boot)


def _first_process(boot: subprocess.Popen[str]) -> int:
    """Number 1 of the host, by its number here."""
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children")
    for _ in range(100):
        if pids := children.read_text().split():
            return int(pids[0])
        time.sleep(0.05)
    raise AssertionError("unshare has no child")


def _write_files(folder: Path) -> None:
    """Keys, sshd's and ssh's settings, and names."""
    home = folder / "home"
    home.mkdir(parents=True)
    for key in (home / "id_ed25519", *(folder / f"key.{name}" for name in NAMES)):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
    )
    (home / "known_hosts").write_text(
        "".join(
            f"{name},{address} {(folder / f'key.{name}.pub').read_text()}"
            for address, name in zip(ADDRESSES, NAMES, strict=True)
        )
    )
    (folder / "ssh_config").write_text(
        f'IdentityFile "{home}/id_ed25519"\nIdentitiesOnly yes\nUserKnownHostsFile "{home}/known_hosts"\n'
        "GlobalKnownHostsFile none\n"
    )
    for name in NAMES:
        (folder / f"sshd_config.{name}").write_text(
            f'HostKey "{folder}/key.{name}"\nAuthorizedKeysFile "{home}/id_ed25519.pub"\nPidFile none\nUsePAM no\n'
            "StrictModes no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
