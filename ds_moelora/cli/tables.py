"""Tables for people (rich), for documents (markdown), in one call."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 150


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "table") -> str:
    """A table as text. The first column is left-aligned, and so is every column whose header begins with a space.

    Args:
        style: "table" or "markdown".
    """
    left = [i == 0 or name.startswith(" ") for i, name in enumerate(header)]
    names = [name.strip() for name in header]
    if style == "markdown":
        lines = [names, ["---" if is_left else "---:" for is_left in left], *rows]
        return "\n".join([f"{title}:", "", *("| " + " | ".join(line) + " |" for line in lines)])
    out = Table(title=title, title_justify="left", header_style="bold")
    for i, (name, is_left) in enumerate(zip(names, left, strict=True)):
        # Where room is short, headers are broken before the names in the first column.
        out.add_column(name, justify="left" if is_left else "right", no_wrap=i == 0)
    for row in rows:
        out.add_row(*row)
    return rendered(out)


def rendered(content: Table) -> str:
    """As wide as the terminal; colours only there."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else PIPED_WIDTH
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, markup=False)
    with console.capture() as capture:
        console.print(content)
    return capture.get().rstrip("\n")
