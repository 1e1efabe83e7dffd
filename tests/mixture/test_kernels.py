"""The Triton kernels without a GPU: compiled for two generations. tests/optimizer/test_triton.py interprets them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'ds_moelora[triton]'")

from benchmarks.kernel_resources import CAPABILITIES, CASES, resources


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest case; `python -m benchmarks.kernel_resources` has them all."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for row in resources(CASES[-1:], capability):
        assert row.registers <= 255
        assert row.spilled == 0, row
        assert row.shared <= 48 * 1024, row
