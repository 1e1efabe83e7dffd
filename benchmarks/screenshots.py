"""Pictures of TensorBoard, the console and the site in a real browser: `python -m benchmarks.screenshots LOGDIR`.

LOGDIR is the output of a run of the launcher, that of docs/getting_started.md:

    python -m benchmarks.screenshots outputs/words --console words.log --site site

`--console`: a file with what the run printed. `--site`: what `make docs` built.

Needs Chromium (`apt-get install chromium`, or any headless build of it: --browser) and `pip install playwright`, which
drives it; playwright's own download of a browser is not needed.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from launch.cluster.processes import find_free_port

from .harness import ROOT

IMAGES = ROOT.parent / "docs" / "images"
WIDTH = 1500
SITE_PAGES = {"site_first_page": "", "site_choosing": "choosing/"}


@contextlib.contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serves a folder; yields the address once it answers.

    Raises:
        RuntimeError: no answer within a minute.
    """
    port = find_free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = f"http://localhost:{port}/"
            for _ in range(120):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address + "data/environment", timeout=5).close()
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"TensorBoard does not answer at {address}; does {logdir} hold event files?")
            yield address
        finally:
            process.terminate()


def take(browser: Any, address: str, name: str, tab: str, tags: str, waits_for: str, height: int) -> None:
    """One picture of a tab, with the cards whose tags match `tags`."""
    page = browser.new_page(viewport={"width": WIDTH, "height": height})
    page.goto(f"{address}?darkMode=false&tagFilter={quote(tags)}#{tab}")
    page.wait_for_selector(waits_for, timeout=60_000)
    if tab == "timeseries":
        page.get_by_role("button", name="Settings").first.click()  # closes the panel
    if tab == "images":
        page.get_by_text("Show actual image size").click()
    page.wait_for_timeout(5_000)  # curves are drawn after their cards
    shoot(page, name)


def shoot(page: Any, name: str) -> None:
    """Writes docs/images/NAME.png."""
    path = IMAGES / f"{name}.png"
    page.screenshot(path=str(path))
    page.close()
    print(f"{path} ({path.stat().st_size / 1024:.0f} KB)")


def console(browser: Any, log: Path) -> None:
    """What a run printed, as a terminal shows it."""
    text = html.escape(log.read_text())
    page = browser.new_page(viewport={"width": 1020, "height": 200})
    page.set_content(f"<pre style='font: 12px/1.25 monospace; margin: 12px'>{text}</pre>")
    page.set_viewport_size({"width": 1020, "height": page.evaluate("document.documentElement.scrollHeight")})
    shoot(page, "console")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--console", type=Path)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of Chromium (%(default)s)")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tensorboard(args.logdir) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        scalars = "^(?!moe/load$)(moe|riemannian|perf|memory)/"
        take(browser, address, "tensorboard_scalars", "timeseries", scalars, "scalar-card svg", 1970)
        take(browser, address, "tensorboard_heat_map", "images", "^moe/load$", "tf-image-loader img", 790)
        take(browser, address, "tensorboard_hparams", "hparams", "", "tf-hparams-dashboard", 500)
        if args.console:
            console(browser, args.console)
        for name, place in SITE_PAGES.items() if args.site else ():
            page = browser.new_page(viewport={"width": 1300, "height": 800})
            page.goto(f"file://{args.site.resolve()}/{place}index.html")
            page.wait_for_timeout(1_000)
            shoot(page, name)
        browser.close()


if __name__ == "__main__":
    main()
