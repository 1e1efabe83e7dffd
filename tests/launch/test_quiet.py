"""With --json, results alone are on stdout, and each is there as soon as it is printed."""

from __future__ import annotations

import subprocess
import sys

from tests.support.launch_support import ROOT

CODE = """
import os
from launch import quiet
print("what a library says", flush=True)
print('{"answer": 4}', file=quiet.answers())
os._exit(0)
"""


def test_json_is_alone_on_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", CODE, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '{"answer": 4}\n'
    assert "what a library says" in done.stderr
