"""MkDocs hook: the Markdown files outside docs/ become pages of the site, and links between all of them stay right.

The repository is written to be read as files, with links relative to each file; the site has one folder of pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Path in the repository -> page of the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "configs/README.md": "configs.md",
}
SOURCES = {page: source for source, page in OUTSIDE.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Rewrites links: relative to the file in the repository -> relative to the page of the site."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match.group(0)
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / place).exists():
            raise ValueError(f"{source} links to {target}: there is no {place}.")
        if place not in OUTSIDE and not place.startswith("docs/"):
            return f"`{place}`"  # source code: read in the repository
        goal = OUTSIDE.get(place, place.removeprefix("docs/"))
        return f"{mark}[{text}]({posixpath.relpath(goal, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(rewrite, markdown)
