"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for two generations of GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'ds_moelora[triton]'")

from benchmarks.kernel_resources import CAPABILITIES, CASES, resources


def test_kernels_in_the_interpreter_agree_with_float64() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mixture.interpreted"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "examples agree" in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest case; `python -m benchmarks.kernel_resources` has them all."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for row in resources(CASES[-1:], capability):
        assert row.registers <= 255
        assert row.spilled == 0, row
        assert row.shared <= 48 * 1024, row
