"""Tensors added to a safetensors file one at a time are what saving all at once would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds_moelora.tuner.files.tensor_file import DTYPES, append_tensors

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.dictionaries(st.text(min_size=1, max_size=5), st.tuples(shapes, st.sampled_from(list(DTYPES))), max_size=4)


def fill(specs: dict, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in specs.items()}


@given(first=tensors, second=tensors)
@settings(max_examples=50, deadline=None)
def test_any_tensors(first: dict, second: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("file") / "tensors.safetensors"
    old = {"old" + name: t for name, t in fill(first, 0).items()} | {"index": torch.arange(3)}
    new = {"new" + name: t for name, t in fill(second, 1).items()}
    save_file(old, path, metadata={"format": "pt"})
    append_tensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in new.items()}, new.values())
    loaded = load_file(path)
    assert loaded.keys() == old.keys() | new.keys()
    for name, tensor in {**old, **new}.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_old_file_stays_if_a_tensor_is_not_as_announced(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"b is torch.float32 \(3,\), not torch.float32 \(2,\)"):
        append_tensors(path, {"b": (torch.float32, (2,))}, [torch.zeros(3)])
    assert list(load_file(path)) == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["tensors.safetensors"]
