"""The command line: `ds-moelora COMMAND ...`, or `python -m ds_moelora COMMAND ...`.

A command is a module of this folder with `SUMMARY` (one line), `add_arguments(parser)` and `run(args) -> int`, listed
in `COMMANDS`; its docstring is its help, and `parents()`, if there, are parsers whose flags it has too. It raises
ValueError for a mistake in what was asked. The commands of `ds_moelora_command.PROGRAMS` are the launcher's programs,
which get their flags as they are.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import ds_moelora_command as launcher

from .tables import plain

COMMANDS = ("plan", "inspect", "export", "init-adapter")


class _Parser(argparse.ArgumentParser):
    """Reports wrong flags in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help shows the options)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="ds-moelora",
        description="Mixtures of LoRA experts: training, scoring, answering, and tools around them.",
        epilog="Exit codes: 0 done, 1 an unexpected error, 2 a mistake in what was asked.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, summary) in launcher.PROGRAMS.items():
        commands.add_parser(name, help=summary, add_help=False)
    for name in COMMANDS:
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            parents=module.parents() if hasattr(module, "parents") else [],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="traceback of errors that are otherwise one line")
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments without the program's name; None: those of the command line.

    Returns:
        The exit code: 2 for a ValueError (one line on stderr), 1 for any other error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in launcher.PROGRAMS:
        return launcher.main(words)
    args = build_parser().parse_args(words)
    args.words = words
    try:
        return args.run(args)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, ValueError)
        message = plain(" ".join(str(error).split()))
        if not expected:
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"error: {message}", file=sys.stderr)
        return 2 if expected else 1
