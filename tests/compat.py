"""`make compat`: optimizers, tags, engine and adapters beside the versions of PEFT and transformers that people have.

One virtual environment per line of `LINES`, in build/compat. It has these two libraries and what they ask for, and
takes torch, DeepSpeed and pytest from the environment that runs this. The table that is printed has, for each subject,
how many tests passed; the exit status is that of the worst line. `python -m tests.compat 0.18 ...`: the lines that
have one of these words in them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from xml.etree import ElementTree

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "compat"
LINES = (
    ("peft==0.18.1", "transformers==5.6.0"),  # LLaMA-Factory's
    ("peft==0.20.0", "transformers==5.16.1"),  # axolotl's
    ("peft==0.20.0", "transformers==5.19.0"),  # ms-swift's
    ("peft", "transformers"),  # the newest on the day that the environment is made
)
SUBJECTS = {
    "optimizer": ["optimizer/test_optimizer.py"],
    "engine": ["optimizer/test_zero_engine.py", "optimizer/test_guard.py", "conformance/test_plain_lora.py"],
    "tags": ["tuner/test_adapter_tagging.py"],
    "MoE-LoRA": ["tuner/test_adapter_layer.py", "tuner/test_adapter_saving.py", "tuner/test_goat_saving.py"],
    "losses": ["tuner/test_aux_loss.py", "tuner/test_adapter_balance.py"],
    "by name": ["project/test_autoload.py", "tuner/test_conventions.py"],
}
VERSIONS = """
import json
from importlib.metadata import version
print(json.dumps([version(name) for name in ("peft", "transformers", "torch", "deepspeed")]))
"""


def environment(requirements: tuple[str, ...]) -> Path:
    """The Python of a line's virtual environment, which is made unless it is there."""
    folder = FOLDER / "-".join(requirements).replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        own = next(folder.glob("lib/python*/site-packages"))
        (own / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        # pip says that what other packages of this environment ask for is not met; the tests tell.
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *requirements], check=True)
        (folder / ".ready").touch()
    return python


def run_tests(python: Path) -> dict[str, tuple[int, int, list[str]]]:
    """By subject: passed, skipped, and the names of those that failed."""
    report = python.parents[1] / "report.xml"
    paths = [f"tests/{path}" for paths in SUBJECTS.values() for path in paths]
    env = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "torch_extensions"),
    }
    command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *paths]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, env=env)
    found: dict[str, tuple[int, int, list[str]]] = {subject: (0, 0, []) for subject in SUBJECTS}
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.attrib["classname"] or case.attrib["name"]  # the latter of a file that cannot be imported
        path = module.removeprefix("tests.").replace(".", "/") + ".py"
        subject = next(subject for subject, paths in SUBJECTS.items() if path in paths)
        passed, skipped, failed = found[subject]
        if case.find("failure") is not None or case.find("error") is not None:
            failed = [*failed, f"{path}::{case.attrib['name']}"]
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
        found[subject] = (passed, skipped, failed)
    return found


def cell(passed: int, skipped: int, failed: list[str]) -> str:
    extra = [f"{len(failed)} failed"] * bool(failed) + [f"{skipped} skipped"] * bool(skipped)
    return f"{passed} passed" + "".join(f", {part}" for part in extra)


def main() -> int:
    table = Table("PEFT", "transformers", "torch", "DeepSpeed", *SUBJECTS, box=box.MARKDOWN)
    all_failed = []
    for requirements in LINES:
        if sys.argv[1:] and not any(word in " ".join(requirements) for word in sys.argv[1:]):
            continue
        python = environment(requirements)
        versions = json.loads(subprocess.check_output([python, "-W", "ignore", "-c", VERSIONS], text=True))
        found = run_tests(python)
        table.add_row(*versions, *(cell(*found[subject]) for subject in SUBJECTS))
        all_failed += [
            f"PEFT {versions[0]}, transformers {versions[1]}: {name}" for *_, f in found.values() for name in f
        ]
        if not any(passed for passed, *_ in found.values()):
            all_failed.append(f"PEFT {versions[0]}, transformers {versions[1]}: nothing ran")
    Console(width=200).print(table)
    print("\n".join(all_failed))
    return int(bool(all_failed))


if __name__ == "__main__":
    sys.exit(main())
