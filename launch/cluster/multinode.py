"""Starts a run on several hosts, after a look at all of them. `launch/multinode.sh` calls this; docs/multinode.md."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Started as a script: Python put this folder first on the path; the repository's root is what is needed.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.checks.errors import EXIT_ERROR, EXIT_USAGE, UsageError, UserError
from launch.cluster.host_checks import Job, find_problems
from launch.cluster.hosts import check_name, read_hostfile
from launch.cluster.launchers import LAUNCHERS, start

# Variables that ranks on other hosts need as well; those that look like secrets only when they are named, since they
# can be read in the hosts' process lists.
PREFIXES = ("DEEPSPEED_", "DS_", "GLOO_", "HF_", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "OMP_", "PYTHON", "TOKENIZERS_",
            "TORCH_", "TRANSFORMERS_", "UCX_", "XDG_CACHE_HOME")  # fmt: skip
SECRET = re.compile("TOKENS?(?![A-Z])|SECRET|PASS|PWD|KEY|CREDENTIAL|AUTHORIZ", re.IGNORECASE)
NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")
PROGRAMS = {"pdsh": "pdsh", "openmpi": "openmpi-bin", "mpirun": "openmpi-bin"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """Flags have the names of DeepSpeed's launcher."""
    parser = _Parser(prog="launch/multinode.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--hostfile", required=True, help="DeepSpeed's: one `name slots=N` per line.")
    parser.add_argument("--launcher", default="pdsh", choices=LAUNCHERS, help="Who starts the ranks.")
    parser.add_argument("--launcher_args", action="append", default=[], metavar="WORD",
                        help="One more word for pdsh, mpirun or torchrun: --launcher_args=--tag-output")  # fmt: skip
    parser.add_argument("--master_addr", help="Address of the first host for the others. Default: its name.")
    parser.add_argument("--master_port", type=int, default=29500, help="A port that is free there.")
    parser.add_argument("--node_rank", type=int, help="With --launcher no_ssh: this host's line, counted from 0.")
    parser.add_argument("--ssh_port", type=int, help="Default: ssh's own configuration.")
    parser.add_argument("--connect_timeout", type=int, default=10, help="Seconds for a connection by ssh.")
    parser.add_argument("--accept_new_host_keys", "--accept-new-host-keys", action="store_true",
                        help="Take the ssh keys of unknown hosts unseen.")  # fmt: skip
    parser.add_argument("--python", default=sys.executable, help="Interpreter, at the same path on every host.")
    parser.add_argument("--export", action="append", default=[], metavar="NAME", help="One more variable for ranks.")
    parser.add_argument("--check_only", action="store_true", help="Look at the hosts; start nothing.")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="script", help="launch/train.py and its flags.")
    return parser


def make_job(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Job, argparse.Namespace]:
    """Reads flags, host file and variables."""
    options = make_parser().parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise UsageError("no script was named; write it behind the flags: launch/train.py --deepspeed ...")
    hosts = read_hostfile(options.hostfile)
    _check_numbers(options, len(hosts))
    try:
        address = check_name(options.master_addr or next(iter(hosts)))
    except ValueError as error:
        raise UsageError(f"--master_addr: {error}.") from error
    package = PROGRAMS.get(options.launcher)
    program = "mpirun" if package == "openmpi-bin" else options.launcher
    if package and shutil.which(program) is None:
        raise UserError(f"--launcher {options.launcher} needs {program}: apt-get install {package}.")
    keys = "accept-new" if options.accept_new_host_keys else "yes"
    ssh_options = ["-oBatchMode=yes", f"-oConnectTimeout={options.connect_timeout}", f"-oStrictHostKeyChecking={keys}",
                   "-oServerAliveInterval=5", "-oServerAliveCountMax=6"]  # fmt: skip
    job = Job(
        hosts=hosts,
        hostfile=str(Path(options.hostfile).resolve()),
        python=options.python,
        command=command,
        cwd=os.getcwd(),
        env=exported(environ, options.export),
        master_addr=address,
        master_port=options.master_port,
        ssh_options=ssh_options,
        ssh_port=options.ssh_port,
        launcher=options.launcher,
    )
    return job, options


def exported(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Variables for the ranks: by prefix, by name, and those in .deepspeed_env (home, then working directory)."""
    chosen = {k: v for k, v in environ.items() if k.startswith(PREFIXES) and not SECRET.search(k)}
    for name in names:
        if name not in environ:
            raise UserError(f"--export {name}: there is no such variable here.")
        chosen[name] = environ[name]
    for folder in (Path.home(), Path.cwd()):
        path = folder / environ.get("DS_ENV_FILE", ".deepspeed_env")
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
            name, separator, value = line.partition("=")
            if not line.strip() or line.startswith("#"):
                continue
            if not separator or not NAME.fullmatch(name.strip()):
                raise UserError(f"{path}, line {number}: {line!r} should be NAME=VALUE.")
            chosen[name.strip()] = value.strip()
    return chosen


def _check_numbers(options: argparse.Namespace, num_hosts: int) -> None:
    for name, value in (("master_port", options.master_port), ("ssh_port", options.ssh_port)):
        if value is not None and not 1 <= value <= 65535:
            raise UsageError(f"--{name} {value} must be from 1 to 65535.")
    if options.connect_timeout < 1:
        raise UsageError(f"--connect_timeout {options.connect_timeout} must be at least 1.")
    by_hand = options.launcher == "no_ssh"
    if by_hand != (options.node_rank is not None):
        raise UsageError("--launcher no_ssh needs --node_rank, on every host its own; no other launcher takes it.")
    if by_hand and not 0 <= options.node_rank < num_hosts:
        raise UsageError(f"--node_rank {options.node_rank} must be from 0 to {num_hosts - 1}: one per host.")
    if by_hand and options.launcher_args:
        raise UsageError("--launcher_args has no effect with --launcher no_ssh.")


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, then starts; returns the exit code."""
    try:
        job, options = make_job(sys.argv[1:] if argv is None else argv, os.environ)
        # By hand nobody is reached by ssh; every host finds out about itself when it starts.
        problems = [] if job.launcher == "no_ssh" else find_problems(job)
        for problem in problems:
            print(f"multinode: {problem}.", file=sys.stderr)
        if problems:
            print(f"multinode: {len(problems)} to put right; nothing was started.", file=sys.stderr)
            return EXIT_ERROR
        ranks = sum(job.hosts.values())
        print(f"multinode: {len(job.hosts)} hosts, {ranks} ranks, {job.launcher}: nothing found amiss.", flush=True)
        return 0 if options.check_only else start(job, options.node_rank, options.launcher_args)
    except UserError as error:
        print(f"multinode: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
