"""What can be wrong on the hosts of a run, found before anything starts there.

Communication: one ssh to each host. The first host is asked first and keeps the master port open; all others are
asked at once, and connect to it. Nothing is written anywhere.
"""

from __future__ import annotations

import base64
import json
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import remote

ANSWER_SECONDS = 60
# What ssh says, and what to do about it.
SSH_REMEDIES = {
    "Host key verification failed": "Compare its key and add it to ~/.ssh/known_hosts (`ssh {host}` asks), or pass "
    "--accept_new_host_keys to take unknown keys unseen; one that has changed is refused all the same.",
    "Permission denied": "Let this user in by key: `ssh-copy-id {host}`, with an agent for keys with a passphrase.",
    "Could not resolve hostname": "Its name is in neither DNS nor /etc/hosts, or misspelt in the host file.",
    "Connection refused": "No sshd listens there: start it, or name its port by --ssh_port.",
    "timed out": "It is down, or a firewall drops the connection.",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on several hosts.

    Args:
        hosts: {name: slots}, in the order of the ranks.
        hostfile: its path.
        python: the interpreter, at the same path on every host.
        command: script and arguments. cwd: where they run.
        env: variables of the ranks. master_addr, master_port: where rank 0 listens.
        ssh_options: of every ssh. ssh_port: None: ssh's own.
        launcher: who starts the ranks.
    """

    hosts: dict[str, int]
    hostfile: str
    python: str
    command: list[str]
    cwd: str
    env: dict[str, str]
    master_addr: str
    master_port: int
    ssh_options: list[str]
    ssh_port: int | None
    launcher: str

    @property
    def ssh_words(self) -> list[str]:
        """Options of every ssh, none with a space in it."""
        return [*self.ssh_options, *([] if self.ssh_port is None else [f"-p{self.ssh_port}"])]

    @property
    def root(self) -> str:
        """The repository."""
        return str(Path(__file__).resolve().parents[2])

    @property
    def script(self) -> str:
        return str(Path(self.cwd, self.command[0]))

    def ssh(self, host: str, words: list[str]) -> list[str]:
        """The command that runs `words` on `host`, each of them quoted for the shell there."""
        return ["ssh", *self.ssh_words, "--", host, shlex.join(words)]


def find_problems(job: Job) -> list[str]:
    """All that is wrong, one `host: what; what to do` each; empty if the run can start."""
    here = remote.facts(_question(job))
    first, *others = job.hosts
    with _asked(job, first, listen=job.master_port) as answer:
        listens = isinstance(answer, dict) and "listen_error" not in answer
        connect = [job.master_addr, job.master_port] if listens else None
        with ThreadPoolExecutor(max_workers=32) as pool:
            answers = {
                first: answer,
                **dict(zip(others, pool.map(lambda h: _ask(job, h, connect), others), strict=True)),
            }
    problems = []
    for host, found in answers.items():
        wrong = [found] if isinstance(found, str) else judge(job, host, found, here)
        problems += [f"{host}: {text}" for text in wrong]
    return problems + _same_names(job, answers)


def judge(job: Job, host: str, found: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What is wrong with one host's answer, compared with the launching machine's."""
    problems = [
        f"{package} {found['versions'][package]}, but {version} here; install the same version on every host"
        for package, version in here["versions"].items()
        if found["versions"][package] != version and package != "ds_moelora"
    ]
    mine, theirs = here["versions"]["ds_moelora"], found["versions"]["ds_moelora"]
    if theirs != mine and job.root not in found["missing"]:
        problems.append(f"ds_moelora in {job.root} is {theirs}, but {mine} here; bring the copies to one state")
    problems += [f"{path} is not there; a shared file system, or a copy at the same path" for path in found["missing"]]
    if "listen_error" in found:
        problems.append(
            f"port {job.master_port} cannot be used: {found['listen_error']}; choose another by --master_port, or end "
            "what holds it"
        )
    if found["connect_error"]:
        problems.append(
            f"no connection to the master, {job.master_addr} port {job.master_port}: {found['connect_error']}; open "
            "the firewall between the hosts, or name an address of the first host that all reach by --master_addr"
        )
    if 0 < found["devices"] < job.hosts[host]:
        problems.append(f"slots={job.hosts[host]}, but it has {found['devices']} GPUs; correct the host file")
    return problems + _judge_interface(job, found)


def _judge_interface(job: Job, found: dict[str, Any]) -> list[str]:
    """gloo, which connects ranks on CPUs, listens on one interface: the named one, or the one of the host's name."""
    interface = job.env.get("GLOO_SOCKET_IFNAME")
    if interface is not None:
        absent = [name for name in interface.split(",") if name not in found["interfaces"]]
        return [
            f"GLOO_SOCKET_IFNAME={name}: it has no such interface, but {', '.join(found['interfaces'])}"
            for name in absent
        ]
    address = found["address"]
    if found["devices"] == 0 and len(job.hosts) > 1 and (address is None or address.startswith("127.")):
        what = "cannot be resolved" if address is None else f"is {address}"
        return [
            f"its own name {found['hostname']} {what} there, where other hosts cannot reach gloo; set "
            f"GLOO_SOCKET_IFNAME to the network's interface (one of {', '.join(found['interfaces'])})"
        ]
    return []


def _same_names(job: Job, answers: dict[str, Any]) -> list[str]:
    """DeepSpeed's MPI discovery counts local ranks by host name; and two names may be one machine."""
    seen: dict[str, str] = {}
    problems = []
    for host, found in answers.items():
        if isinstance(found, str):
            continue
        first = seen.setdefault(found["hostname"], host)
        if first != host:
            problems.append(
                f"{host}: calls itself {found['hostname']}, as {first} does; if they are one machine, add up "
                "its slots, otherwise give each a name of its own"
            )
    return problems


def _question(job: Job, connect: list[Any] | None = None, listen: int | None = None) -> dict[str, Any]:
    return {
        "root": job.root,
        "paths": [*dict.fromkeys((job.root, job.cwd, job.script))],
        "python_path": [path for path in job.env.get("PYTHONPATH", "").split(":") if path],
        "connect": connect,
        "listen": listen,
    }


@contextmanager
def _asked(job: Job, host: str, connect: list[Any] | None = None, listen: int | None = None) -> Iterator[Any]:
    """A host's answer, or what is wrong instead; a port that it was asked to hold is held until the end."""
    source = base64.b64encode(Path(remote.__file__).read_bytes()).decode()
    words = [job.python, "-c", "import base64,sys;exec(base64.b64decode(sys.argv[1]))", source]
    words += ["probe", remote.encode(_question(job, connect, listen))]
    process = subprocess.Popen(
        job.ssh(host, words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    limit = threading.Timer(ANSWER_SECONDS, process.kill)
    limit.start()
    try:
        # A login shell may greet before the answer comes.
        lines = (line for line in process.stdout or () if line.startswith(remote.MARK))
        line = next(lines, None)
        yield json.loads(line[len(remote.MARK) :]) if line else _failure(job, host, process)
    finally:
        limit.cancel()
        try:
            process.communicate(timeout=10)  # closes its stdin: the port is let go
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _ask(job: Job, host: str, connect: list[Any] | None) -> Any:
    with _asked(job, host, connect) as answer:
        return answer


def _failure(job: Job, host: str, process: subprocess.Popen[str]) -> str:
    """Why there is no answer, and what to do."""
    code, said = process.wait(), " ".join((process.stderr.read() if process.stderr else "").split())[-600:]
    if code == -signal.SIGKILL:
        return f"no answer within {ANSWER_SECONDS} s; it hangs, perhaps on a file system that is away. {said}"
    if code in (126, 127):
        return f"{job.python} cannot be run there ({said}); install the same environment, or name another by --python"
    if code != 255:
        return f"{job.python} ended with code {code} there: {said}"
    remedy = next((text.format(host=host) for words, text in SSH_REMEDIES.items() if words in said), "")
    return f"ssh: {said} {remedy}"
