"""Shows the first training batch as the trainer would get it: which tokens are read, and which are trained.

Takes every flag of launch/train.py. No weights are loaded, and nothing is written. In colour, trained tokens are green
and all others blue; with --no-color (or the environment's NO_COLOR) trained tokens stand between [[ and ]]. The
work is done by the launcher's launch/data/preview.py. In a pipe trained tokens stand between [[ and ]], too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import ds_moelora_command as launcher

SUMMARY = "one training batch with its loss mask, from the launcher's flags"
TAKES_OTHER_FLAGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command's own options; the launcher's are its own business."""
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch to show (default: 1)")
    parser.add_argument("--no-color", action="store_true", help="brackets instead of colours")


def run(args: argparse.Namespace) -> int:
    """Runs the launcher's preview in a process of its own.

    Raises:
        ValueError: `--rows` below 1, or there is no launcher.
    """
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows} must be at least 1.")
    script = launcher.script("data/preview.py")
    own = ["--rows", str(args.rows), *(["--no-color"] if args.no_color else [])]
    debug = ["--show_traceback", "true"] if args.debug else []
    return subprocess.run([sys.executable, str(script), *own, *args.other_flags, *debug], check=False).returncode
