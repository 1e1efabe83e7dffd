"""With --json, results alone are on stdout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch_support import ROOT, launch_environment, tiny_model


def test_json_is_alone_on_stdout(tmp_path: Path) -> None:
    """`generate.py` as a whole program, into a pipe."""
    model = tiny_model(tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'what a library says')\n")
    environment = launch_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    command = [sys.executable, "launch/generate.py", "--adapter", "none", "--model_name_or_path", str(model)]
    command += ["--prompt", "abc", "x\u00fcz", "--max_new_tokens", "4", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "what a library says" in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["abc", "x\u00fcz"]
    assert all(isinstance(answer["answer"], str) for answer in answers)


@pytest.mark.parametrize("program", ["train", "evaluate", "generate", "data/preview"])
def test_the_filter_comes_before_the_libraries(program: str) -> None:
    """What DeepSpeed says when it is imported is said then or never."""
    imports = re.findall(r"^(?:from|import) (\S+)(?: import (\w+))?", (ROOT / f"launch/{program}.py").read_text(), re.M)
    foreign = [names for names in imports if names[0].partition(".")[0] not in (*sys.stdlib_module_names, "__future__")]
    assert foreign[0] == ("launch", "quiet")
