"""Every launcher trains on two hosts what one host trains, to the bit, from a folder full of quotes and spaces."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.multinode.network import INTERFACE, NAMES, Host, TwoHosts
from tests.multinode.runs import Workplace
from tests.support.launch_support import ROOT, launch

STANDIN = Path(__file__).parent / "standin"
TIMEOUT = 300.0
# What Open MPI does not take along by itself, and the cable.
MPI_EXPORTS = [word for name in ("PATH", "GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
               for word in ("-x", name)] + ["--bind-to", "none", "--mca", "btl_tcp_if_include", INTERFACE]  # fmt: skip
Report = Callable[[str, str], None]

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def one_host(place: Workplace, net: TwoHosts) -> str:
    """The same two ranks on one host: `deepspeed --num_gpus 2`."""
    finished = launch(place.flags("one host"))
    assert finished.code == 0, finished.output[-4000:]
    return "one host"


def run(net: TwoHosts, place: Workplace, command: list[str], **more: str) -> str:
    """Runs a command on the first host, in the copy; nothing may be left running on either host."""
    environment = {**place.environment, **more}
    code, output = net.hosts[0].run(command, environment, TIMEOUT, place.copy)
    assert code == 0, output[-6000:]
    for host in net.hosts:
        wait_for_silence(host)
    return output


def wait_for_silence(host: Host, seconds: float = 5) -> None:
    """Launchers end a moment before what they started has been reaped."""
    for _ in range(int(10 * seconds)):
        left = host.processes()
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"left running: {left}")


def tell(report: Report, launcher: str, seconds: float, result: str) -> None:
    report("launchers on two hosts", f"{launcher:34} {seconds:5.1f} s   {result}")


@pytest.mark.parametrize("launcher", ["pdsh", "ssh", "torchrun", "openmpi", "mpirun"])
def test_entry_script(net: TwoHosts, place: Workplace, one_host: str, launcher: str, report: Report):
    started = time.monotonic()
    output = run(net, place, [*place.multinode(launcher), *place.script(launcher)])
    assert f"2 hosts, 2 ranks, {launcher}: nothing found amiss" in output
    place.assert_equal(launcher, one_host)
    tell(report, f"multinode.sh --launcher {launcher}", time.monotonic() - started, "losses equal to the bit")


@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun"])
def test_one_command_on_each_host(net: TwoHosts, place: Workplace, one_host: str, launcher: str, report: Report):
    """By hand: `deepspeed --no_ssh`, and torchrun whose nodes find each other."""
    started = time.monotonic()
    rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "host-a:29400"]
    output = f"{launcher} by hand"
    processes = []
    for rank, host in enumerate(net.hosts):
        command = [*place.multinode("no_ssh"), "--node_rank", str(rank)]
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
        processes.append(host.start([*command, *place.script(output)], place.environment, place.copy))
    for host, process in zip(net.hosts, processes, strict=True):
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            for other in net.hosts:
                other.kill_all()
            raise
        assert process.returncode == 0, f"{host.name}\n{said[-4000:]}"
    place.assert_equal(output, one_host)
    what = "multinode.sh --launcher no_ssh" if launcher == "no_ssh" else "torchrun --rdzv_backend c10d"
    tell(report, what, time.monotonic() - started, "losses equal to the bit")


def test_mpirun_by_hand(net: TwoHosts, place: Workplace, one_host: str, report: Report):
    """Ranks and master are found by DeepSpeed through mpi4py: nothing tells them but MPI."""
    started = time.monotonic()
    command = ["mpirun", "-np", "2", "--host", ",".join(NAMES), *MPI_EXPORTS, sys.executable]
    run(net, place, [*command, *place.script("mpi4py")])
    place.assert_equal("mpi4py", one_host)
    tell(report, "mpirun python launch/train.py", time.monotonic() - started, "losses equal to the bit")


def test_slurm(net: TwoHosts, place: Workplace, one_host: str, report: Report):
    """launch/slurm.sbatch, with stand-ins for srun and scontrol that start the tasks by ssh."""
    started = time.monotonic()
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": ",".join(NAMES), "SLURM_NTASKS_PER_NODE": "1"}
    path = f"{STANDIN}:{place.environment['PATH']}"
    run(net, place, ["bash", "launch/slurm.sbatch", *place.flags("slurm")], PATH=path, **slurm)
    place.assert_equal("slurm", one_host)
    tell(report, "slurm.sbatch (stand-in srun)", time.monotonic() - started, "losses equal to the bit")


def test_experts_across_hosts(net: TwoHosts, place: Workplace, report: Report):
    """--ep_size 2 with one rank per host: every layer's experts cross the cable."""
    started = time.monotonic()
    flags = ("zero2_ep", "--ep_size", "2", "--ep_dispatch", "weights", "--expert_compute", "dense")
    run(net, place, [*place.multinode("ssh"), *place.script("ep", *flags)])
    seconds = time.monotonic() - started
    finished = launch(place.flags("ep one host", *flags))
    assert finished.code == 0, finished.output[-4000:]
    place.assert_equal("ep", "ep one host")
    tell(report, "multinode.sh --launcher ssh, ep_size 2", seconds, "losses equal to the bit")


def test_ranks_and_groups_on_four_ranks(net: TwoHosts, place: Workplace, report: Report):
    """Two ranks per host: ranks of one host in a row, expert-parallel groups inside hosts, no shared memory."""
    script = str(ROOT / "tests" / "multinode" / "show_groups.py")
    expected = ["0 host-a 0 [0, 1]", "1 host-a 1 [0, 1]", "2 host-b 0 [2, 3]", "3 host-b 1 [2, 3]"]
    output = run(net, place, [*place.multinode("torchrun", slots=2), script], PYTHONPATH=str(ROOT))
    assert sorted(re.findall(r"rank (\d .*\])", output)) == expected, output[-4000:]
    assert "lie on several nodes" not in output

    command = ["mpirun", "-np", "4", "--hostfile", str(place.folder / "hosts2"), "--map-by", "node"]
    output = run(net, place, [*command, "-x", "PYTHONPATH", *MPI_EXPORTS, sys.executable, script], PYTHONPATH=str(ROOT))
    assert (
        "2 of 2 expert-parallel groups of 2 ranks lie on several nodes, such as ranks 0 (host-a), 1 (host-b)" in output
    )
    assert "--map-by slot" in output
    report("launchers on two hosts", "two ranks per host: expert-parallel groups [0, 1] on host-a, [2, 3] on host-b")


def test_a_host_that_fails_ends_the_others(net: TwoHosts, place: Workplace):
    script = place.folder / "fails.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n")
    code, output = net.hosts[0].run([*place.multinode("ssh"), str(script)], place.environment, 120, place.copy)
    assert code == 3, output
    assert "multinode: host-b ended with code 3; ending the others" in output
    for host in net.hosts:
        wait_for_silence(host)


def test_ranks_end_with_the_launching_process(net: TwoHosts, place: Workplace):
    """It is killed outright; its connections close, and that ends the ranks on both hosts."""
    script = place.folder / "sleeps.py"
    script.write_text("import time\ntime.sleep(600)\n")
    launching = net.hosts[0].start([*place.multinode("ssh"), str(script)], place.environment, place.copy)
    for _ in range(600):
        if all(any(f"-u {script}" in line for line in host.processes()) for host in net.hosts):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the ranks did not start")
    assert net.hosts[0].run(["pkill", "-KILL", "-f", "launch/cluster/multinode.py"])[0] == 0
    for host in net.hosts:
        wait_for_silence(host, 50)
    launching.communicate()
