"""`python -m ds_moelora inspect`: numbers against the definitions, findings, and what cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moelora.cli import main
from ds_moelora.tuner.config import PEFT_TYPE_IN_FILES
from ds_moelora.tuner.files.adapter_file import read_adapter
from ds_moelora.tuner.files.inspection import layer_facts, router_shares

from ..support.adapter_support import adapted
from .test_export import saved_mixture

KEY = "base_model.model.model.layers.0.self_attn.q_proj.moelora_experts."


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "changes",
    [{}, {"shared_A": True}, {"init_lora_weights": "goat"}, {"shared_expert": True, "rank_pattern": {"v_proj": 3}}],
)
def test_numbers_are_their_definitions(changes: dict[str, Any], tmp_path: Path):
    saved_mixture(tmp_path, **changes)
    for layer in read_adapter(tmp_path).layers:
        facts = layer_facts(layer)
        products = [layer.scaling * (B @ A.T).double() for A, B in map(layer.expert, range(facts.num_experts))]
        assert [e.norm for e in facts.experts] == pytest.approx([p.norm().item() for p in products], rel=1e-5)
        for i, expert in enumerate(facts.experts):
            A, B = (factor.double() for factor in layer.expert(i))
            assert expert.condition_A == pytest.approx(torch.linalg.cond(A).item() ** 2, rel=1e-5)
            assert expert.condition_B == pytest.approx(torch.linalg.cond(B).item() ** 2, rel=1e-5)
            if layer.start is not None:
                start = layer.scaling * (layer.start[1][i] @ layer.start[0][i].T).double()
                assert expert.moved == pytest.approx((products[i] - start).norm().item(), rel=1e-5)
        unit = torch.stack([p.flatten() / p.norm() for p in products])
        cosines = (unit @ unit.T).fill_diagonal_(0)
        assert facts.similarity == pytest.approx(max(0.0, cosines.max().item()), abs=1e-6)
        assert facts.duplicates == []
        assert facts.finite
        assert (facts.shared_norm is None) == (layer.shared is None)


def test_router_shares():
    torch.manual_seed(0)
    even = torch.eye(4, 16).double()
    assert router_shares(even, 2).tolist() == pytest.approx([1.0] * 4, abs=0.05)
    loud = even.clone()
    loud[0] *= 1000
    # An expert whose logit is all but alone is first or last, half of the time each; of two slots one may be left.
    assert router_shares(loud, 1)[0].item() == pytest.approx(2.0, abs=0.1)
    assert router_shares(even, 4).tolist() == [1.0] * 4


def test_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved_mixture(tmp_path)
    assert inspected(tmp_path, capsys)["findings"] == []

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY + "lora_A"][2] = 2 * tensors[KEY + "lora_A"][0]
        tensors[KEY + "lora_B"][2] = tensors[KEY + "lora_B"][0]
        tensors[KEY + "lora_B"][1] = 0
        tensors[KEY.replace("q_proj", "v_proj") + "router.weight"][0, 0] = math.nan

    change(tmp_path, spoil)
    found = inspected(tmp_path, capsys)
    text = " ".join(found["findings"])
    for part in ("not finite: 1 of 6", "add nothing: 1 of 6", "q_proj: 0=2"):
        assert part in text
    (layer,) = (layer for layer in found["layers"] if layer["name"] == "model.layers.0.self_attn.q_proj")
    assert layer["duplicates"] == [[0, 2]]
    assert layer["similarity"] == pytest.approx(1.0)
    assert layer["experts"][1]["norm"] == 0
    assert layer["experts"][1]["condition_B"] is None


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapted(init_lora_weights=True).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--layers", "--experts", r"layers\.1.*v_proj"]) == 0
    text = capsys.readouterr().out
    for part in ("6 layers", "model.layers.1.mlp.down_proj", "share x E/k", "no training yet", "inf"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 150
    assert main(["inspect", str(tmp_path)]) == 0
    assert "self_attn.q_proj" in capsys.readouterr().out


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rename(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{PEFT_TYPE_IN_FILES}"', '"LORA"'))


def lower_rank(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 1'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is not there"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be used"),
        (truncate, "adapter_model.safetensors is damaged or cut short"),
        (rename, "adapter_config.json cannot be used: peft_type 'LORA' is another type"),
        (lambda f: change(f, lambda t: t.pop(KEY + "router.weight")), "q_proj lacks router.weight"),
        (lower_rank, "by the configuration (num_experts=4, r=1)"),
        (lambda f: change(f, lambda t: t.clear()), "has no experts"),
    ],
)
def test_errors_are_one_line(spoil: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapted().save_pretrained(tmp_path)
    spoil(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
    with pytest.raises(ValueError, match=r"\w"):
        main(["inspect", str(tmp_path), "--debug"])


@pytest.mark.parametrize(("expression", "message"), [("(", "no regular expression"), ("x_proj", "matches none of 6")])
def test_expressions(expression: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapted().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--experts", expression]) == 2
    assert message in capsys.readouterr().err
