"""Tables for people (rich), for documents (markdown), in one call."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 150


def plain(text: str) -> str:
    """Names come from files: what a terminal would obey (escapes, other control characters) becomes visible."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "table") -> str:
    """A table as text, as wide as the terminal; colours only there.

    The first column is left-aligned, and so is every column whose header begins with a space.

    Args:
        style: "table" or "markdown".
    """
    left = [i == 0 or name.startswith(" ") for i, name in enumerate(header)]
    names = [name.strip() for name in header]
    rows = [[plain(cell.replace("\n", " ")) for cell in row] for row in rows]
    title = plain(title)
    if style == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines = [names, ["---" if is_left else "---:" for is_left in left], *rows]
        return "\n".join([f"{title}:", "", *("| " + " | ".join(line) + " |" for line in lines)])
    out = Table(title=title, title_justify="left", header_style="bold")
    for i, (name, is_left) in enumerate(zip(names, left, strict=True)):
        # Where room is short, headers are broken before the names in the first column.
        out.add_column(name, justify="left" if is_left else "right", no_wrap=i == 0)
    for row in rows:
        out.add_row(*row)
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else PIPED_WIDTH
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(out)
    return capture.get().rstrip("\n")
