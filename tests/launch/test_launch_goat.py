"""The launcher with experts from singular values: ZeRO-3, resuming, and loading on the original model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ds_moelora  # noqa: F401  (so that PEFT knows the adapter)
from ds_moelora.tuner.start import svd_init
from tests.support.launch_support import alpaca_rows, assert_same_adapter, launch, tiny_model, write_jsonl

pytestmark = pytest.mark.dist


def test_zero3_trains_resumes_and_saves_what_the_original_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "data.jsonl", alpaca_rows(16))
    whole, resumed, cache = (tmp_path / name for name in ("whole", "resumed", "cache"))

    def run(output_dir: Path, *more: str) -> dict[str, torch.Tensor]:
        flags = {"model_name_or_path": model, "dataset_name": data, "deepspeed": "configs/zero3.json", "lora_r": 2}
        flags |= {"output_dir": output_dir, "init_lora_weights": "goat", "scaling": "goat", "svd_cache_dir": cache}
        flags |= {"num_experts": 2, "top_k": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 3}
        flags |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        finished = launch([*words, *more])
        assert finished.code == 0, finished.output[-4000:]
        return load_file(output_dir / "adapter_model.safetensors")

    trained = run(whole)
    assert len(list(cache.glob("*.safetensors"))) == 14
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    run(resumed, "--resume_from_checkpoint", "true")
    assert_same_adapter(whole, resumed)

    monkeypatch.setattr(svd_init, "singular_triplets", None)  # loading decomposes nothing
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), whole)
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    original = AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.down_proj.weight
    entries = {name.rpartition(".")[2]: t for name, t in trained.items() if name.startswith(layer + ".")}
    s = (3 * 48 / 2) ** 0.5
    given = s / 2 * torch.einsum("eor,eir->oi", entries["initial_B"], entries["initial_A"])
    torch.testing.assert_close(loaded.get_submodule(layer).base_layer.weight, original - given)
    assert (entries["lora_A"] - entries["initial_A"]).abs().max() > 1e-5
