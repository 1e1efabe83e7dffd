"""What is published has been checked, on every path: without DeepSpeed, in the last step, in a callback, the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds_moelora import MoELoRAConfig
from tests.support.failures import FAULTY, ForkedRun
from tests.support.launch_support import SMALL, alpaca_rows, assert_same_adapter, launch, tiny_model, write_jsonl

PLAIN = ["--optim", "adamw_torch"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = write_jsonl(folder / "rows.jsonl", alpaca_rows(16))
    return [
        "--model_name_or_path",
        str(tiny_model(folder / "model")),
        "--dataset_name",
        str(rows),
        *SMALL,
        "--report_to",
        "none",
    ]


# (ranks, ZeRO stage and precision, flags, the checkpoint that stays)
PATHS = {
    "no DeepSpeed": (1, None, ["--save_steps", "1", *PLAIN], "checkpoint-2"),
    "no DeepSpeed, the final adapter alone": (1, None, ["--save_strategy", "no", *PLAIN], None),
    "stage 0 in bf16, the final adapter alone": (2, 0, ["--save_strategy", "no"], None),
    "stage 2, the adapter alone": (2, 2, ["--save_steps", "1", "--save_only_model"], "checkpoint-2"),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", list(PATHS))
def test_nan_in_the_last_step_is_not_published(name: str, flags: list[str], tmp_path: Path) -> None:
    """The weights are NaN after the last of three steps, though its loss is finite."""
    ranks, stage, more, kept = PATHS[name]
    if stage is not None:
        config = json.loads(Path("configs/zero2.json").read_text()) | {"zero_optimization": {"stage": stage}}
        config |= {"bf16": {"enabled": True}} if stage == 0 else {}
        (tmp_path / "config.json").write_text(json.dumps(config))
        more = [*more, "--deepspeed", str(tmp_path / "config.json"), *(["--bf16", "true"] if stage == 0 else [])]
    out = tmp_path / "out"
    arguments = [*flags, *more, "--max_steps", "3", "--output_dir", str(out)]
    run = ForkedRun(arguments, tmp_path / "log", {"FAULT": "rate:all:3"}, ranks=ranks, script=FAULTY)
    assert run.finish() == 1, run.output[-4000:]
    assert "lora_A is not finite (its weights)" in run.output
    assert not (out / "adapter_model.safetensors").exists()
    assert [path.name for path in sorted(out.glob("checkpoint-*"))][-1:] == ([kept] if kept else [])
    if kept:
        assert f"{out / kept} is complete" in run.output
        assert all(tensor.isfinite().all() for tensor in load_file(out / kept / "adapter_model.safetensors").values())


def test_nothing_is_published_by_a_callback_either(tmp_path: Path) -> None:
    """`model.save_pretrained`, whoever calls it."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model"))
    model = get_peft_model(base, MoELoRAConfig(r=2, num_experts=2, top_k=1, target_modules=["q_proj"]))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name)[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="lora_A is not finite"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.dist
@pytest.mark.parametrize("how", [["--deepspeed", "configs/zero3.json"], [*PLAIN, "--save_only_model"]])
def test_the_best_model_is_loaded_at_the_end(how: list[str], flags: list[str], tmp_path: Path) -> None:
    """Even where it is not the last one: at a rate of 10 every step makes the model worse."""
    out = tmp_path / "out"
    more = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    more += ["--learning_rate", "10", "--lr_scheduler_type", "constant", "--max_steps", "3", "--eval_fraction", "0.25"]
    finished = launch([*flags, *how, *more, "--output_dir", str(out)], ranks=1)
    assert finished.code == 0, finished.output[-4000:]
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best != 3, losses
    assert_same_adapter(out / f"checkpoint-{best}", out)
