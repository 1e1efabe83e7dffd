"""A start from singular values together with the routing options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ds_moelora import MoELoRAConfig, save_without_residual
from ds_moelora.mixture.goat import mean_product
from ds_moelora.tuner.start.base_weight import read_weight

from ..support.adapter_support import adapted, batch, llama, train_step
from ..support.goat import layers

OPTIONS = {
    "init_lora_weights": "goat",
    "scaling": "goat",
    "rank_pattern": {"v_proj": 3},
    "num_experts_pattern": {r"layers\.0\..*": 3},
    "top_p": 0.7,
    "shared_expert": True,
}


def test_every_layer_starts_from_its_own_segments_and_reloads(tmp_path: Path) -> None:
    original = {name: m.weight.data.double() for name, m in llama().named_modules() if hasattr(m, "weight")}
    model, inputs = adapted(**OPTIONS), batch()
    for layer in layers(model):
        experts = layer.experts("default")
        first, v = "layers.0" in experts.pair.name, "v_proj" in experts.pair.name
        assert (experts.num_experts, experts.rank) == (3 if first else 4, 3 if v else 2)
        mean = mean_product(*(f.detach().double() for f in experts.factors()), experts.scaling)
        torch.testing.assert_close(read_weight(layer.base_layer).double() + mean, original[experts.pair.name])
        assert not experts.shared.lora_B.any()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        train_step(model, inputs)
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, wanted, rtol=0, atol=1e-5)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shared_A=True cannot be used with init_lora_weights='goat'"):
        MoELoRAConfig(init_lora_weights="goat", shared_A=True)
    with pytest.raises(ValueError, match=r"v_proj"):
        adapted(init_lora_weights="goat", rank_pattern={"v_proj": 17})
    with pytest.raises(ValueError, match="lora_alpha=8 has no effect"):
        adapted(init_lora_weights="goat", scaling="goat", alpha_pattern={"v_proj": 8})
    with pytest.raises(ValueError, match="has shared_expert, rank_pattern, num_experts_pattern: "):
        save_without_residual(adapted(**OPTIONS), str(tmp_path))
