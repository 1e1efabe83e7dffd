"""Every recipe starts: the launcher with a tiny model of the recipe's architecture and a few rows of its layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import RobertaConfig, RobertaForSequenceClassification

from ds_moelora import MoELoRAConfig
from launch.demo_base import byte_tokenizer
from tests.launch_support import ROOT, launch, tiny_model, write_jsonl
from tests.test_launch_images import tiny_clip, write_pictures

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.dist


def tiny_roberta(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, pad_token_id=tokenizer.pad_token_id, num_labels=2,
                           max_position_embeddings=300)  # fmt: skip
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stand_ins(recipe: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """A model and data in the place of those that the recipe takes from the hub."""
    task = recipe.get("task", "causal-lm")
    if task == "image-classification":
        return tiny_clip(folder / "model"), write_pictures(folder / "data", 4)
    if task == "sequence-classification":
        rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(8)]
        return tiny_roberta(folder / "model"), write_jsonl(folder / "data.jsonl", rows)
    columns = [recipe.get(f"{name}_column", name) for name in ("instruction", "output")]
    rows = [{columns[0]: f"say {i}", columns[1]: f"it is {i}", "type": "other"} for i in range(8)]
    return tiny_model(folder / "model"), write_jsonl(folder / "data.jsonl", rows)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_starts(path: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    model, data = stand_ins(recipe, tmp_path)
    arguments = ["--config", str(path), "--model_name_or_path", str(model), "--dataset_name", str(data),
                 "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--save_strategy", "no",
                 "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]  # fmt: skip
    if "eval_dataset_name" in recipe:
        arguments += ["--eval_dataset_name", str(data), "--eval_dataset_split", "train"]
    finished = launch(arguments, ranks=1)
    assert finished.code == 0, finished.output[-4000:]
    summary = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["optimizer"] == "AdamW"
    assert math.isfinite(summary["last_loss"])
    saved = MoELoRAConfig.from_pretrained(str(tmp_path / "out"))
    assert (saved.num_experts, saved.top_k, saved.r) == (recipe["num_experts"], recipe["top_k"], recipe["r"])
    for name in ("init_lora_weights", "scaling", "eta", "rho", "lora_dropout", "router_aux_loss_coef"):
        assert getattr(saved, name) == recipe.get(name, getattr(saved, name)), name


def test_there_are_recipes() -> None:
    assert {"goat_vit", "goat_glue", "goat_commonsense", "goat_math"} <= {path.stem for path in RECIPES}
