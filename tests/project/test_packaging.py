"""The wheel that `pip install .` would build, without installing it: `make package` does that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

from .test_autoload import ENTRY_POINT

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "[console_scripts]\nds-moelora = ds_moelora_command:main\n"
TOP = ("ds_moelora_autoload.py", "ds_moelora_command.py")
BUILD = "from setuptools.build_meta import build_wheel; build_wheel({!r})"


def test_wheel(tmp_path: Path) -> None:
    """Every module of the package, the launcher and its configs inside it, and nothing else; it starts elsewhere."""
    source, target = tmp_path / "source", tmp_path / "wheel"
    target.mkdir()
    shutil.copytree(ROOT / "ds_moelora", source / "ds_moelora", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "benchmarks").mkdir()  # would be in the way if it were found
    (source / "benchmarks" / "__init__.py").touch()
    for name in (*TOP, "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
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
    launcher = {f"ds_moelora/_launcher/{p.relative_to(source)}" for n in ("launch", "configs")
                for p in (source / n).rglob("*") if p.is_file()}  # fmt: skip
    assert set(names) == {*modules, *launcher, *TOP}
    assert "".join(entry_points).split() == f"{COMMAND}{ENTRY_POINT}".split()
    assert licences
    assert set(metadata.get_all("Provides-Extra")) == {"train", "triton", "mpi", "bench", "docs", "dev"}
    assert metadata["Description-Content-Type"] == "text/markdown"
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path / "site")
    check_launcher(tmp_path / "site", tmp_path)


def check_launcher(site: Path, folder: Path) -> None:
    """The command as pip writes it, from another folder: finds its own recipes, and says what is not there."""
    code = "import sys; from ds_moelora_command import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", "--config", "goat_math", "--deepspeed", "nothing"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 1
    assert f"--deepspeed nothing: there is no such file (working directory: {folder})" in run.stderr
