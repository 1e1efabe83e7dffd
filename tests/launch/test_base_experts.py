"""`--target_parameters`: LoRA on the experts of MoE bases, from training to the merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launch import evaluate
from launch.checks.arguments import parse_arguments
from launch.checks.errors import UserError
from launch.demo.base import byte_tokenizer
from launch.training import base_experts

from ..support.base_experts import ARCHITECTURES, base_model
from ..support.launch_support import launch, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"say {i + 10}=", "completion": f"it is {i + 10}"} for i in range(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


# Processes and ZeRO stage: one of each kind of run, as few processes as tell them apart.
RUNS = {"mixtral": (2, 2), "qwen3_moe": (2, 3), "gpt_oss": (1, 2), "deepseek_v3": (1, 2), "olmoe": (1, 2)}


@pytest.mark.dist
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_train_save_resume_evaluate_merge(
    architecture: str, data: Path, tmp_path: Path, report: Callable[[str, str], None]
) -> None:
    ranks, stage = RUNS[architecture]
    tokenizer = byte_tokenizer()
    base_model(architecture, vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = ["--deepspeed", f"configs/zero{stage}.json", "--model_name_or_path", str(tmp_path / "base")]
    flags += ["--dataset_name", str(data), "--eval_dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
    flags += ["--target_parameters", "experts", "--target_modules", "q_proj", "--max_length", "64", "--save_steps", "2"]
    flags += ["--per_device_train_batch_size", "2", "--report_to", "none", "--learning_rate", "1e-2"]
    if ranks == 2:  # interrupted, and resumed
        finished = launch([*flags, "--max_steps", "2"], ranks)
        assert finished.code == 0, finished.output[-4000:]
        flags += ["--resume_from_checkpoint", "true"]
    finished = launch([*flags, "--max_steps", "4"], ranks)
    assert finished.code == 0, finished.output[-4000:]
    assert "computed by grouped products" in finished.output
    summary = json.loads((tmp_path / "run" / "train_summary.json").read_text())
    assert summary["steps"] == 4

    scores = evaluate.main(["--adapter", str(tmp_path / "run"), "--dataset_name", str(data), "--dtype", "float32"])
    assert scores["metrics"]["loss"] == pytest.approx(summary["eval"]["eval_loss"], rel=1e-4)
    report("LoRA on base experts by the launcher", f"{architecture}: {summary['eval']} {scores['metrics']}")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    assert any("experts" in name and p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert torch.allclose(loaded(input_ids=ids).logits, trained, atol=1e-4)


@pytest.mark.dist
def test_mixtures_on_attention_beside_lora_on_experts(data: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    base_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = ["--deepspeed", "configs/zero2.json", "--model_name_or_path", str(tmp_path / "base"), "--max_steps", "2"]
    flags += ["--dataset_name", str(data), "--eval_dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
    flags += ["--target_parameters", "experts", "--num_experts", "4", "--target_modules", "q_proj", "v_proj"]
    finished = launch([*flags, "--max_length", "64", "--report_to", "none", "--learning_rate", "1e-2"], ranks=1)
    assert finished.code == 0, finished.output[-4000:]
    said = " ".join(finished.output.split())
    assert "The adapter is on 4 mixtures on modules, 4 stacked parameters" in said
    summary = json.loads((tmp_path / "run" / "train_summary.json").read_text())
    scores = evaluate.main(["--adapter", str(tmp_path / "run"), "--dataset_name", str(data), "--dtype", "float32"])
    assert scores["metrics"]["loss"] == pytest.approx(summary["eval"]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_experts", "4", "--target_modules", "none"], "of mixtures on modules"),
        (["--lora_dropout", "0.1"], "LoRA on stacked experts has none"),
        (["--load_in_4bit"], "leaves stacked experts as they are"),
    ],
)
def test_flags_of_other_adapters_are_refused(flags: list[str], message: str) -> None:
    arguments = parse_arguments(["--target_parameters", "experts", "--deepspeed", "configs/zero2.json", *flags], {})
    with pytest.raises(UserError, match=message):
        base_experts.lora_config(arguments, None)


def test_a_dense_base_is_refused() -> None:
    arguments = parse_arguments(["--target_parameters", "experts", "--deepspeed", "configs/zero2.json"], {})
    config = base_experts.lora_config(arguments, None)
    with pytest.raises(UserError, match="no experts in stacked parameters"):
        base_experts.name_experts(config, torch.nn.Linear(2, 2))
