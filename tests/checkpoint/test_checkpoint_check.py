"""A checkpoint that is not whole is recognised by every kind of file in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_moelora.checkpoint.whole import check_checkpoint

FILES = ["global_step1/rank_0_states.pt", "rng_state_0.pth", "adapter_model.safetensors", "trainer_state.json"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "global_step1").mkdir()
    (tmp_path / "latest").write_text("global_step1")
    for name in FILES[:2]:
        torch.save({"x": torch.randn(100)}, tmp_path / name)
    save_file({"x": torch.randn(100)}, tmp_path / FILES[2])
    (tmp_path / FILES[3]).write_text(json.dumps({"global_step": list(range(100))}))
    return tmp_path


def test_whole(checkpoint: Path) -> None:
    check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9, 0.99])
def test_cut_short(checkpoint: Path, name: str, kept: float) -> None:
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"{path.name} is incomplete.*checkpoint before it"):
        check_checkpoint(checkpoint)


def test_not_there(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        check_checkpoint(checkpoint / "nothing")
    (checkpoint / "latest").write_text("global_step9")
    with pytest.raises(ValueError, match="global_step9"):
        check_checkpoint(checkpoint)


def test_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        check_checkpoint(tmp_path)
