"""What is said beside the results. Imported before DeepSpeed.

What libraries say over and over is left out unless `--verbose` is among the arguments. With `--json` the program's own
output is alone on stdout: file descriptor 1 is stderr from here on, and `answers()` is what was stdout.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

FLAG = "--verbose"
KNOWN = ("Setting accelerator to CPU",)  # by every process that imports DeepSpeed; the panel says what is trained on


class Repeated(logging.Filter):
    """Lets a message through once, and those of `KNOWN` never."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text in self._seen or text.startswith(KNOWN):
            return False
        self._seen.add(text)
        return True


def is_verbose() -> bool:
    """Whether the command line asks for everything that libraries say."""
    return FLAG in sys.argv


def shows_bars() -> bool:
    """Progress bars: on a terminal, which can draw over them."""
    return sys.stderr.isatty() or is_verbose()


if not is_verbose():
    logging.getLogger("DeepSpeed").addFilter(Repeated())

_stdout: TextIO | None = None
if "--json" in sys.argv:
    _stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")  # line by line, into a pipe too
    os.dup2(2, 1)


def answers() -> TextIO:
    """Where results go."""
    return _stdout or sys.stdout
