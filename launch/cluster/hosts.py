"""DeepSpeed's host file, read strictly: what is accepted here, DeepSpeed and Open MPI read alike.

    # comment
    worker-0 slots=8
    worker-1 slots=8      # a slot is one rank: a GPU, or on machines without GPUs a process

DeepSpeed's own reader takes `slots=8x` for 8 and any text for a host's name, which later becomes part of a shell's
command line. Here a name is letters, digits, `.`, `_` and `-`, and begins and ends with a letter or digit.
"""

from __future__ import annotations

import re
from pathlib import Path

from launch.checks.errors import UserError

MAX_CHARACTERS = 1 << 20
MAX_NAME = 253
MAX_SLOTS = 1024
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_SLOTS = re.compile(r"slots=([0-9]{1,9})")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Hosts and their slots, in the file's order.

    Args:
        path: of a file with one `name slots=N` per line; empty lines and what follows a `#` are left out.

    Returns:
        {name: slots}; ranks are numbered in this order, those of one host one after the other.
    """
    hosts: dict[str, int] = {}
    first_lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(_read(Path(path)).split("\n"), start=1):
        words = line.split("#")[0].strip(" \t\r")
        if not words:
            continue
        try:
            name, slots = _parse(words)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if name.lower() in first_lines:
            problems.append(f"line {number}: {name} is already in line {first_lines[name.lower()]}; add up its slots")
            continue
        first_lines[name.lower()] = number
        hosts[name] = slots
    if problems:
        raise UserError(f"--hostfile {path}: {'; '.join(problems)}.")
    if not hosts:
        raise UserError(f"--hostfile {path} names no host; write one `name slots=N` per line.")
    return hosts


def check_name(name: str) -> str:
    """`name`, if it can be a host's.

    Raises:
        ValueError: it is empty, too long, begins with `-`, or holds what a shell, ssh or pdsh would interpret.
    """
    if len(name) > MAX_NAME:
        raise ValueError(f"the host name {name[:20]!r}... has {len(name)} characters, {MAX_NAME} are allowed")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no host name: letters, digits, '.', '_' and '-', a letter or digit first and last. A user, "
            "a port or an IPv6 address belongs into ~/.ssh/config, under a name of its own"
        )
    return name


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # ValueError: not text, or a path with a null byte
        raise UserError(f"--hostfile {str(path)!r} cannot be read: {error}.") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"--hostfile {path} is longer than {MAX_CHARACTERS} characters: this is no host file.")
    return text


def _parse(words: str) -> tuple[str, int]:
    """(name, slots) of one line."""
    name, *settings = re.split(r"[ \t]+", words)
    check_name(name)
    if len(settings) != 1:
        raise ValueError(f"{words[:80]!r} should be `{name} slots=N` and nothing else")
    match = _SLOTS.fullmatch(settings[0])
    slots = int(match[1]) if match else 0
    if not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"{settings[0][:40]!r} of {name} should be slots=N, N a whole number from 1 to {MAX_SLOTS}")
    return name, slots
