"""The command `ds-moelora`: starts a program of the launcher (`PROGRAMS`), or asks `ds_moelora.cli`.

The module stands beside the package, whose import costs seconds and memory: who only starts a program needs neither.
The launcher is no part of the package's code: nothing imports it. A checkout has it in `launch/`; an installed package
in `ds_moelora/_launcher/launch/`, with `configs/` beside it (setup.py puts both there).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Command -> (file in launch/, summary). Started with their flags as they are; their --help is the program's own.
PROGRAMS = {
    "train": ("train.py", "fine-tunes a model, under DeepSpeed's launcher where there is more than one device"),
    "evaluate": ("evaluate.py", "scores an adapter on evaluation data"),
    "generate": ("generate.py", "lets an adapter answer prompts"),
    "preview": ("data/preview.py", "one training batch with its loss mask, from the flags of train"),
}
# Of DeepSpeed's own launcher.
RUNNER_FLAGS = ("num_gpus", "num_nodes", "hostfile", "include", "exclude", "master_addr", "master_port")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments without the program's name; None: those of the command line.

    Returns:
        The exit code, as `ds_moelora.cli.main`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in PROGRAMS:
        from ds_moelora import cli

        return cli.main(words)
    return start(words[0], words[1:])


def script(name: str) -> Path:
    """The file of a program of the launcher, e.g. "train.py"."""
    here = Path(__file__).resolve().parent
    inside = here / "ds_moelora" / "_launcher"
    return (inside if inside.is_dir() else here) / "launch" / name


def start(command: str, words: Sequence[str]) -> int:
    """Runs one of `PROGRAMS` in a process of its own; returns its exit code."""
    file = script(PROGRAMS[command][0])
    return subprocess.run(command_line(command, file, words), check=False).returncode


def command_line(command: str, file: Path, words: Sequence[str]) -> list[str]:
    """The program itself, or DeepSpeed's launcher: if a flag of it is given, or there are several devices."""
    alone = [sys.executable, str(file), *words]
    if command != "train" or {"-h", "--help"} & {*words} or "RANK" in os.environ:
        return alone
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in RUNNER_FLAGS:
        parser.add_argument(f"--{flag}")
    own, rest = parser.parse_known_args(words)
    given = {flag: value for flag, value in vars(own).items() if value is not None}
    if not given:
        import torch

        if torch.accelerator.device_count() <= 1:
            return alone
    level = [] if "--verbose" in words else ["--log_level", "warning"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *level]
    return [*runner, *(f"--{flag}={value}" for flag, value in given.items()), str(file), *rest]
