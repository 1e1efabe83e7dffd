"""What the entry point (`ds_moelora_autoload`) adds to `import torch`: processes with and without it, in turn.

`--repeats` processes of each kind; a median of whole imports differs by more than the entry point takes, so its own
time, from torch's look at the installed packages to its return, is measured as well.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
IMPORT = """
import time
start = time.perf_counter()
import torch
print(time.perf_counter() - start, "ds_moelora_autoload" in __import__("sys").modules)
"""
ENTRY_POINT = """
import torch, time
from importlib.metadata import entry_points
(point,) = [p for p in entry_points(group="torch.backends") if p.name == "ds_moelora"]
start = time.perf_counter()
point.load()()
print(time.perf_counter() - start, True)
"""


def seconds(code: str, path: Path, **env: str) -> float:
    """What the process measured.

    Raises:
        RuntimeError: the entry point ran although it should not, or did not.
    """
    env = {**os.environ, "PYTHONPATH": str(path), **env}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=path)
    time, ran = done.stdout.split()
    if (ran == "True") != (path.name == "with"):
        raise RuntimeError(f"the entry point ran: {ran}; is ds_moelora installed in {sys.prefix} from another folder?")
    return float(time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        installed, plain = Path(folder, "with"), Path(folder, "without")
        for place, text in ((installed, "[torch.backends]\nds_moelora = ds_moelora_autoload:autoload\n"), (plain, "")):
            info = place / "ds_moelora-0.1.0.dist-info"  # before the installed one, whose name it has
            info.mkdir(parents=True)
            (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ds_moelora\nVersion: 0.1.0\n")
            (info / "entry_points.txt").write_text(text)
        # As pip installs it: byte code is there.
        compileall.compile_file(shutil.copy(ROOT / "ds_moelora_autoload.py", installed), quiet=1)
        times: dict[str, list[float]] = {"with": [], "without": [], "entry point": []}
        for _ in range(repeats):
            times["without"].append(seconds(IMPORT, plain))
            times["with"].append(seconds(IMPORT, installed))
            times["entry point"].append(seconds(ENTRY_POINT, installed, TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    whole = {kind: median(times[kind]) for kind in ("with", "without")}
    print(
        f"import torch, medians of {repeats}: without the entry point {whole['without'] * 1e3:.1f} ms, with it "
        f"{whole['with'] * 1e3:.1f} ms (difference {(whole['with'] - whole['without']) * 1e3:+.1f} ms)"
    )
    own = sorted(times["entry point"])
    print(f"the entry point alone: median {median(own) * 1e3:.2f} ms, largest {own[-1] * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
