"""The wheel that `pip install .` would build, without installing it: `make package` does that."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from .test_autoload import ENTRY_POINT

ROOT = Path(__file__).resolve().parents[2]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel({!r})"


def test_wheel(tmp_path: Path) -> None:
    """Every module of the package and nothing else; the extras that the documentation names."""
    source, target = tmp_path / "source", tmp_path / "wheel"
    target.mkdir()
    shutil.copytree(ROOT / "ds_moelora", source / "ds_moelora", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch", "benchmarks"):  # would be in the way if they were found
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    for name in ("ds_moelora_autoload.py", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD.format(str(target))], cwd=source, check=True, capture_output=True)
    (path,) = target.iterdir()
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (metadata,) = (message_from_bytes(wheel.read(n)) for n in wheel.namelist() if n.endswith("/METADATA"))
        entry_points = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith("/entry_points.txt")]
        licences = [name for name in wheel.namelist() if name.endswith("LICENSE")]
    modules = {
        str(p.relative_to(source)) for p in (source / "ds_moelora").rglob("*") if p.suffix in (".py", ".typed", ".cpp")
    }
    assert set(names) == {*modules, "ds_moelora_autoload.py"}
    assert entry_points == [ENTRY_POINT]
    assert licences
    assert set(metadata.get_all("Provides-Extra")) == {"train", "mpi", "bench", "docs", "dev"}
    assert metadata["Description-Content-Type"] == "text/markdown"
