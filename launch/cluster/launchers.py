"""How each launcher starts the ranks of a `Job`. No shell line is built from what the user wrote.

launcher    started here                               on each host
pdsh        deepspeed --hostfile --launcher pdsh       deepspeed.launcher.launch, and per rank `remote.py exec`
ssh         one ssh per host                           `remote.py serve`, and in it deepspeed.launcher.launch
torchrun    one ssh per host                           `remote.py serve`, and in it torchrun
openmpi     deepspeed --hostfile --launcher openmpi    Open MPI's daemon, and per rank `remote.py exec`
mpirun      mpirun --hostfile                          the same
no_ssh      deepspeed --no_ssh --node_rank             (by hand on every host)
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.checks.errors import UserError
from launch.cluster import remote
from launch.cluster.host_checks import Job

LAUNCHERS = ("pdsh", "ssh", "torchrun", "openmpi", "mpirun", "no_ssh")
REMOTE = str(Path(remote.__file__).resolve())
# What DeepSpeed's runner exports through a shell line (pdsh), or with quotes as part of the value (Open MPI).
EXPORTED_BY_DEEPSPEED = ("PYTHON", "MLFLOW", "MV2", "UCX", "NCCL")


def start(job: Job, node_rank: int | None, launcher_args: list[str]) -> int:
    """Runs the job with its launcher until all ranks have ended.

    Args:
        node_rank: with no_ssh: which of the hosts this one is.
        launcher_args: more arguments for pdsh, mpirun or torchrun.

    Returns:
        The exit code; pdsh, Open MPI and no_ssh replace this process instead.
    """
    if job.launcher not in ("ssh", "torchrun"):
        _become(job, node_rank, launcher_args)
    return _serve_nodes(job, launcher_args)


def _become(job: Job, node_rank: int | None, launcher_args: list[str]) -> NoReturn:
    """Replaces this process by the launcher."""
    if job.launcher == "no_ssh":
        remote.enter({"env": job.env, "cwd": job.cwd})
        command = no_ssh_command(job, node_rank)
    else:
        # The ranks get their variables from the payload, .deepspeed_env's among them.
        for name in [name for name in os.environ if name.startswith(EXPORTED_BY_DEEPSPEED)]:
            del os.environ[name]
        os.environ["DS_ENV_FILE"] = "none"
        make = {"pdsh": pdsh_command, "openmpi": openmpi_command, "mpirun": mpirun_command}[job.launcher]
        command = make(job, launcher_args)
    if job.launcher == "pdsh":
        os.environ["PDSH_SSH_ARGS_APPEND"] = " ".join(job.ssh_words)
        os.chdir("/")  # DeepSpeed writes `cd` and the working directory into a shell line, unquoted
    sys.stdout.flush()
    os.execvp(command[0], command)


def pdsh_command(job: Job, launcher_args: list[str]) -> list[str]:
    """`deepspeed --launcher pdsh`. DeepSpeed joins its words with spaces and pdsh hands them to the hosts' shells."""
    if shlex.quote(job.python) != job.python:
        raise UserError(
            f"{job.python} has characters that DeepSpeed's pdsh launcher does not quote; use --launcher ssh, or an "
            "environment at another path."
        )
    return [
        *_deepspeed(job), "--launcher", "pdsh", *_joined("--launcher_args", launcher_args), "--no_local_rank",
        shlex.quote(REMOTE), "exec", _payload(job),
    ]  # fmt: skip


def openmpi_command(job: Job, launcher_args: list[str]) -> list[str]:
    """`deepspeed --launcher openmpi`, which would otherwise look for an interface called eth0."""
    arguments = [*_mpi_arguments(job), *launcher_args]
    if "btl_tcp_if_include" not in arguments:
        arguments += ["--mca", "btl_tcp_if_include", job.env.get("GLOO_SOCKET_IFNAME", "lo")]
    return [*_deepspeed(job), "--launcher", "openmpi", *_joined("--launcher_args", arguments), REMOTE, "exec",
            _payload(job)]  # fmt: skip


def mpirun_command(job: Job, launcher_args: list[str]) -> list[str]:
    """Plain `mpirun`."""
    ranks = str(sum(job.hosts.values()))
    return ["mpirun", "-np", ranks, "--hostfile", job.hostfile, *_mpi_arguments(job), *launcher_args,
            job.python, "-u", REMOTE, "exec", _payload(job)]  # fmt: skip


def no_ssh_command(job: Job, node_rank: int | None) -> list[str]:
    """`deepspeed --no_ssh` for this host's ranks."""
    return [*_deepspeed(job), "--no_ssh", "--node_rank", str(node_rank), "--no_local_rank", *job.command]


def node_command(job: Job, node_rank: int, launcher_args: list[str]) -> list[str]:
    """What starts one host's ranks, run there by `remote.py serve`."""
    slots = list(job.hosts.values())
    if job.launcher == "torchrun":
        return [
            job.python, "-m", "torch.distributed.run", "--nnodes", str(len(slots)), "--node_rank", str(node_rank),
            "--nproc_per_node", str(slots[node_rank]), "--master_addr", job.master_addr,
            "--master_port", str(job.master_port), *launcher_args, *job.command,
        ]  # fmt: skip
    # What `deepspeed --no_ssh` starts in its turn; it needs no host file there.
    world = {host: list(range(count)) for host, count in job.hosts.items()}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return [
        job.python, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={node_rank}",
        f"--master_addr={job.master_addr}", f"--master_port={job.master_port}", "--no_local_rank", *job.command,
    ]  # fmt: skip


def _deepspeed(job: Job) -> list[str]:
    """The front end itself; every host has been reached and the master's address is settled."""
    multi = [] if job.launcher == "no_ssh" else ["--force_multi", "--no_ssh_check"]
    return [job.python, "-m", "deepspeed.launcher.runner", "--hostfile", job.hostfile, *multi,
            "--master_addr", job.master_addr, "--master_port", str(job.master_port)]  # fmt: skip


def _mpi_arguments(job: Job) -> list[str]:
    """Ranks of one host in a row, cores left to torch, and ssh as it was checked."""
    return ["--map-by", "slot", "--bind-to", "none", "--mca", "plm_rsh_agent", "ssh",
            "--mca", "plm_rsh_args", " ".join(job.ssh_words)]  # fmt: skip


def _joined(flag: str, words: list[str]) -> list[str]:
    return [f"{flag}={shlex.join(words)}"] if words else []


def _payload(job: Job) -> str:
    """One rank's command. MASTER_ADDR and MASTER_PORT spare Open MPI's ranks DeepSpeed's search for them."""
    master = {"MASTER_ADDR": job.master_addr, "MASTER_PORT": str(job.master_port)}
    command = [job.python, "-u", *job.command]
    return remote.encode({"cwd": job.cwd, "env": {**job.env, **master}, "command": command})


def _serve_nodes(job: Job, launcher_args: list[str]) -> int:
    """One ssh per host. The first that fails ends all others; signals are handed on."""
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    for rank, host in enumerate(job.hosts):
        payload = {"cwd": job.cwd, "env": job.env, "command": node_command(job, rank, launcher_args)}
        command = job.ssh(host, [job.python, REMOTE, "serve", remote.encode(payload)])
        # A session of its own: Ctrl-C must not reach ssh before its host has been told.
        nodes[host] = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in nodes.values():
            _tell(process, number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watch(nodes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(nodes: dict[str, subprocess.Popen[bytes]]) -> int:
    """Waits for all nodes; gives signs of life. Returns the first code that is not 0."""
    first_code, beat, deadline = 0, 0.0, float("inf")
    while running := [process for process in nodes.values() if process.poll() is None]:
        failed = [(host, p.returncode) for host, p in nodes.items() if p.returncode]
        if failed and not first_code:
            host, first_code = failed[0]
            print(f"multinode: {host} ended with code {first_code}; ending the others", file=sys.stderr, flush=True)
            for process in running:
                process.stdin.close()  # type: ignore[union-attr]
            deadline = time.monotonic() + remote.GRACE_SECONDS + 10
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        if not first_code and time.monotonic() - beat > remote.BEAT_SECONDS:
            beat = time.monotonic()
            for process in running:
                _tell(process, 0)
        time.sleep(0.2)
    return first_code or next((p.returncode for p in nodes.values() if p.returncode), 0)


def _tell(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal's number to `remote.py serve`; one that has ended needs none."""
    try:
        os.write(process.stdin.fileno(), b"%d\n" % number)  # type: ignore[union-attr]
    except (BrokenPipeError, ValueError):
        return
