"""Exported LoRAs: what they make up is the mixture, and PEFT's own LoRA loads every one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from ds_moelora.cli import main
from ds_moelora.mixture.reference import max_relative_error
from ds_moelora.tuner import MoELoRALayer
from ds_moelora.tuner.files.export import export_adapter

from ..support.adapter_support import adapted, batch, bert, gpt2, llama

# fp32: the exported sum is another order of the same products.
TOLERANCE = 1e-6

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5.0}, "num_experts_pattern": {"q_proj": 2},
                 "top_k_pattern": {"down_proj": 3}},
    "shared expert": {"shared_expert": True},
    "shared A": {"shared_A": True},
    "top_p": {"top_p": 0.6, "top_k": 3, "router_temperature": 0.5},
    "goat": {"init_lora_weights": "goat", "scaling": "goat"},
    "goat and shared": {"init_lora_weights": "goat", "shared_expert": True, "scaling": "rslora"},
}  # fmt: skip


def saved_mixture(folder: Path, builder: Any = llama, **changes: Any) -> PeftModel:
    """A mixture whose factors are away from their start, saved."""
    model = adapted(builder, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "router" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def gates_of(description: dict[str, Any], layer: str, router: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gates as docs/export.md tells a reader to compute them."""
    z = x @ router.T / description["temperature"]
    chosen = torch.zeros_like(z, dtype=torch.bool)
    order = z.argsort(-1, descending=True)
    for row, ranked in enumerate(order.tolist()):
        mass = 0.0
        for expert in ranked[: description["layers"][layer]["top_k"]]:
            if description["top_p"] is not None and mass >= description["top_p"]:
                break
            chosen[row, expert] = True
            mass += z[row].softmax(-1)[expert].item()
    return z.masked_fill(~chosen, -torch.inf).softmax(-1)


def contribution(layer: LoraLayer, name: str, x: torch.Tensor) -> torch.Tensor:
    return layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]


@pytest.mark.parametrize("case", CASES)
def test_the_parts_make_up_the_mixture(case: str, tmp_path: Path):
    model = saved_mixture(tmp_path / "adapter", **CASES[case])
    parts = export_adapter(tmp_path / "adapter", tmp_path / "out")
    description = json.loads((tmp_path / "out/mixture.json").read_text())
    routers = load_file(tmp_path / "out" / description["router"])
    assert parts == [*description["experts"], *([description["always"]] if description["always"] else [])]
    plain = PeftModel.from_pretrained(llama(), tmp_path / "out" / parts[0], adapter_name=parts[0])
    for part in parts[1:]:
        plain.load_adapter(tmp_path / "out" / part, part)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, MoELoRALayer)}
    assert layers.keys() == description["layers"].keys()
    for name, layer in layers.items():
        x = torch.randn(11, layer.in_features, generator=torch.Generator().manual_seed(5))
        lora = plain.base_model.model.get_submodule(name)
        with torch.no_grad():
            y = lora.base_layer(x)
            gates = gates_of(description, name, routers[f"{name}.weight"], x)
            for i, gate in enumerate(gates.unbind(-1)):
                y = y + gate[:, None] * contribution(lora, description["experts"][i], x)
            if description["always"]:
                y = y + contribution(lora, description["always"], x)
            assert max_relative_error(y, layer(x)) <= TOLERANCE, name


@pytest.mark.parametrize("builder", [llama, gpt2, bert])
@pytest.mark.parametrize("start", [False, "goat"])
def test_one_expert_is_one_plain_lora(builder: Any, start: Any, tmp_path: Path):
    """Merged or not, heads included, on the unchanged base model."""
    shape = {"num_experts": 1, "top_k": 1, "init_lora_weights": start, "shared_expert": start is False}
    model = saved_mixture(tmp_path / "adapter", builder, dtype=torch.float64, **shape)
    assert export_adapter(tmp_path / "adapter", tmp_path / "out") == ["."]
    plain = PeftModel.from_pretrained(builder().double(), tmp_path / "out").eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        expected = model(**batch(builder)).logits
        # float64: in a whole model with such large experts fp32 rounding grows to 3e-5.
        assert max_relative_error(plain(**batch(builder)).logits, expected) <= 1e-10
        assert max_relative_error(plain.merge_and_unload()(**batch(builder)).logits, expected) <= 1e-10


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    saved_mixture(tmp_path / "adapter")
    out = tmp_path / "deep/out"
    assert main(["export", str(tmp_path / "adapter"), str(out), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["loras"]
    assert [Path(entry["folder"]).name for entry in listed] == [f"expert_{i}" for i in range(4)]
    assert {(entry["r"], entry["lora_alpha"]) for entry in listed} == {(2, 16)}
    assert main(["export", str(tmp_path / "adapter"), str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "again")]) == 0
    for file in sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()):
        assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing temporary is left"


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path):
    saved_mixture(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.endswith("lora_B"))][0, 0, 0] = torch.inf
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lora_B.weight is not finite"):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
