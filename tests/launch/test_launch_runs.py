"""Whole runs of the launcher: two ranks, a tiny model, a few steps."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ds_moelora  # noqa: F401  (so that PEFT knows the adapter)
from launch.training import console
from tests.support.forks import run_script, start_forked
from tests.support.launch_support import (
    SMALL,
    TRAIN,
    alpaca_rows,
    assert_same_adapter,
    find_free_port,
    launch,
    launch_environment,
    question_rows,
    tiny_model,
    write_jsonl,
)

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "alpaca.jsonl", alpaca_rows(24))


def arguments(model: Path, data: Path, config: str, output_dir: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(model), "--dataset_name", str(data), "--deepspeed", f"configs/{config}.json",
            "--output_dir", str(output_dir), "--learning_rate", "1e-2", "--max_length", "256",
            *SMALL, *more]  # fmt: skip


def summary_of(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "train_summary.json").read_text())


def adapter_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "adapter_model.safetensors")


def check_outputs(output_dir: Path, steps: int) -> dict[str, Any]:
    """A finished run's summary, after a look at everything it should have written."""
    summary = summary_of(output_dir)
    assert summary["optimizer"] == "GateRiemannianAdamW"
    assert summary["world_size"] == 2
    assert summary["steps"] == steps
    assert 0 < summary["trainable_parameters"] < summary["all_parameters"]
    assert summary["tokens_per_second"] > 0
    assert math.isfinite(summary["first_loss"])
    assert math.isfinite(summary["last_loss"])
    logged = b"".join(path.read_bytes() for path in output_dir.glob("runs/*/events*"))
    assert b"moe/router_entropy" in logged, "TensorBoard is on by default"
    assert b"riemannian/update_to_weight" in logged
    return summary


def test_causal_lm_and_resume(model: Path, alpaca: Path, tmp_path: Path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    more = ("--max_steps", "4", "--save_steps", "2", "--eval_fraction", "0.25")
    finished = launch(arguments(model, alpaca, "zero2", whole, *more))
    assert finished.code == 0, finished.output[-4000:]
    summary = check_outputs(whole, steps=4)
    assert summary["last_loss"] < summary["first_loss"]
    assert math.isfinite(summary["eval"]["eval_loss"])
    assert 0 <= summary["eval"]["eval_mean_token_accuracy"] <= 1
    assert [Path(path).name for path in summary["checkpoints"]] == ["checkpoint-2", "checkpoint-4"]
    assert [path.name for path in whole.rglob("README.md")] == ["README.md"], "checkpoints have no card"
    assert "Training summary" in finished.output
    check_console(finished.output, 1, 4)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")

    # The saved adapter loads in a process without DeepSpeed.
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), whole)
    assert any("lora_B" in name and parameter.abs().sum() > 0 for name, parameter in loaded.named_parameters())

    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    finished = launch(arguments(model, alpaca, "zero2", resumed, *more, "--resume_from_checkpoint", "true"))
    assert finished.code == 0, finished.output[-4000:]
    check_console(finished.output, 3, 4)
    assert "2 of them since the resume" in finished.output
    continued = summary_of(resumed)
    assert len({path.parent for path in resumed.glob("runs/*/events*")}) == 1
    assert (continued["steps"], continued["resumed_after_step"]) == (4, 2)
    assert continued["tokens"] < summary["tokens"], "those of the steps that this session has done"
    assert continued["tokens_per_second"] == pytest.approx(continued["tokens"] / continued["seconds"])
    assert (continued["first_loss"], continued["last_loss"]) == (summary["first_loss"], summary["last_loss"])
    assert_same_adapter(whole, resumed)
    resume_at_another_rate(model, alpaca, whole, tmp_path / "faster", *more)


def check_console(output: str, first: int, last: int) -> None:
    """The panel, and one line per step with loss, rate, pace, tokens and the routers' health."""
    assert re.search(r"optimizer +GateRiemannianAdamW, learning rate 0.01 \(linear, .*ZeRO stage 2", output)
    assert re.search(r"adapter +14 layers, 2 experts of rank 2, 1 per token; .* trainable", output)
    line = (
        r"{'loss': '\S+', .*'learning_rate': '\S+', .*'step': '(\d)/4', 's/step': '\S+', 'ETA': '0:\d\d', "
        r"'tokens/s': '\S+', 'load': '\S+', 'dead': '\S+', 'balance': '\S+'}"
    )
    assert [int(step) for step in re.findall(line, output)] == list(range(first, last + 1))


def test_a_report_in_a_terminal():
    shown = {"step": " 9/10", "loss": "0.8127", "lr": "7.1e-04", "s/step": "1.31", "ETA": "0:01", "load": "1.62"}
    expected = "step  9/10  loss 0.8127  lr 7.1e-04  1.31 s/step  ETA 0:01  load 1.62"
    assert console.line(shown, {"loss": 0.8127}, True) == expected


def resume_at_another_rate(model: Path, alpaca: Path, trained: Path, resumed: Path, *more: str):
    """A new --learning_rate is said, and steps are as much longer from the first one on."""
    shutil.copytree(trained / "checkpoint-2", resumed / "checkpoint-2")
    more = (*more, "--learning_rate", "5e-2", "--resume_from_checkpoint", "true")
    finished = launch(arguments(model, alpaca, "zero2", resumed, *more))
    assert finished.code == 0, finished.output[-4000:]
    assert "checkpoint-2: flag.learning_rate 0.01 -> 0.05; this run's value holds." in finished.output
    rates = [[entry["learning_rate"] for entry in log_of(path)[2:]] for path in (trained, resumed)]
    assert rates[1] == pytest.approx([5 * rate for rate in rates[0]])
    before, slow, fast = (adapter_of(path) for path in (trained / "checkpoint-2", trained, resumed))
    moved = [sum((after[name] - before[name]).norm() ** 2 for name in before) ** 0.5 for after in (slow, fast)]
    assert 3 < moved[1] / moved[0] < 8, "AdamW's steps are proportional to the rate, up to curvature"


FOUR_EXPERTS = ("--max_steps", "4", "--save_steps", "2", "--eval_fraction", "0.25", "--num_experts", "4")


@pytest.fixture(scope="module")
def whole(model: Path, alpaca: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks train that both have all experts."""
    output_dir = tmp_path_factory.mktemp("experts") / "whole"
    finished = launch(arguments(model, alpaca, "zero2_ep", output_dir, *FOUR_EXPERTS))
    assert finished.code == 0, finished.output[-4000:]
    return output_dir


@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_parallel(model: Path, alpaca: Path, whole: Path, tmp_path: Path, ranks: int):
    """--ep_size 2: trains what --ep_size 1 trains, evaluates, saves one whole adapter; two ranks also resume.

    Four ranks take half as many rows each as two.
    """
    spread, resumed, more, sharded = tmp_path / "spread", tmp_path / "resumed", FOUR_EXPERTS, ("--ep_size", "2")
    if ranks == 4:  # "auto" would try all ways first; two ranks do
        sharded += ("--ep_dispatch", "weights", "--expert_compute", "dense", "--per_device_train_batch_size", "1")
    finished = launch(arguments(model, alpaca, "zero2_ep", spread, *more, *sharded), ranks)
    assert finished.code == 0, finished.output[-4000:]
    first, second = summary_of(whole), summary_of(spread)
    assert second["last_loss"] == pytest.approx(first["last_loss"], rel=1e-3)
    assert second["eval"]["eval_loss"] == pytest.approx(first["eval"]["eval_loss"], rel=1e-3)
    assert second["trainable_parameters"] == first["trainable_parameters"]
    assert_same_adapter(whole, spread, 1e-3)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), spread)

    if ranks == 4:
        return
    shutil.copytree(spread / "checkpoint-2", resumed / "checkpoint-2")
    again = (*more, "--resume_from_checkpoint", "true")
    finished = launch(arguments(model, alpaca, "zero2_ep", resumed, *again, *sharded), ranks)
    assert finished.code == 0, finished.output[-4000:]
    assert_same_adapter(spread, resumed)
    resume_elsewhere(model, alpaca, spread, tmp_path / "elsewhere", *again)


def log_of(output_dir: Path) -> list[dict[str, Any]]:
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def resume_elsewhere(model: Path, alpaca: Path, trained: Path, resumed: Path, *more: str):
    """What two ranks with --ep_size 2 began, one rank under ZeRO-3 brings to the same end, and says how."""
    shutil.copytree(trained / "checkpoint-2", resumed / "checkpoint-2")
    finished = launch(arguments(model, alpaca, "zero3", resumed, *more, "--gradient_accumulation_steps", "2"), ranks=1)
    assert finished.code == 0, finished.output[-4000:]
    for change in ("world_size 2 -> 1", "zero_stage 2 -> 3", "ep_size 2 -> 1"):
        assert f"checkpoint-2: topology.{change}; this run's value holds." in finished.output
    assert_same_adapter(trained, resumed, 1e-3)
    losses = [[entry["loss"] for entry in log_of(path)] for path in (trained, resumed)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_stages_save_the_same_adapter(model: Path, alpaca: Path, tmp_path: Path):
    """ZeRO-3 gathers whole tensors, and offloading at stage 2 keeps our optimizer: both train the same."""
    for config in ("zero3", "zero2_offload"):
        output_dir = tmp_path / config
        finished = launch(arguments(model, alpaca, config, output_dir, "--max_steps", "3", "--save_strategy", "no"))
        assert finished.code == 0, finished.output[-4000:]
        check_outputs(output_dir, steps=3)
    # fp32 sums in another order, over three steps of AdamW, whose first step is a sign: compare in the norm.
    assert_same_adapter(tmp_path / "zero3", tmp_path / "zero2_offload", 1e-3)


def test_sequence_classification(model: Path, tmp_path: Path):
    data = write_jsonl(tmp_path / "train.jsonl", question_rows(24))
    held_out = write_jsonl(tmp_path / "test.jsonl", question_rows(7))
    output_dir = tmp_path / "out"
    finished = launch(
        arguments(model, data, "zero2", output_dir, "--task", "sequence-classification", "--max_steps", "4",
                  "--eval_dataset_name", str(held_out), "--text_pattern", r"is (\d+)")
    )  # fmt: skip
    assert finished.code == 0, finished.output[-4000:]
    summary = check_outputs(output_dir, steps=4)
    assert 0 <= summary["eval"]["eval_accuracy"] <= 1
    assert summary["eval"]["eval_majority_class_accuracy"] == pytest.approx(4 / 7)
    assert math.isfinite(summary["eval"]["eval_loss"])
    assert summary["classes"] == ["no", "yes"]
    saved = adapter_of(output_dir)
    assert any("score" in name for name in saved), "the new head is trained and saved with the adapter"
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    PeftModel.from_pretrained(base, output_dir)


def first_gradient_norm(output_dir: Path) -> float:
    state = json.loads((output_dir / "checkpoint-1" / "trainer_state.json").read_text())
    return next(entry["grad_norm"] for entry in state["log_history"] if "grad_norm" in entry)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_accumulation_does_not_change_the_gradient(model: Path, alpaca: Path, tmp_path: Path, task: str):
    """8 rows at once, or 4 times 2: the same first step, load-balancing loss included."""
    data = alpaca if task == "causal-lm" else write_jsonl(tmp_path / "train.jsonl", question_rows(24))
    norms = []
    for batch, accumulate in (("8", "1"), ("2", "4")):
        output_dir = tmp_path / f"by-{batch}"
        finished = launch(
            arguments(model, data, "zero2", output_dir, "--task", task, "--max_steps", "1", "--save_steps", "1",
                      "--router_aux_loss_coef", "1.0", "--per_device_train_batch_size", batch,
                      "--gradient_accumulation_steps", accumulate), ranks=1
        )  # fmt: skip
        assert finished.code == 0, finished.output[-4000:]
        norms.append(first_gradient_norm(output_dir))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# What a launcher tells its ranks (`make test-multinode` has the launchers themselves).
STARTERS: dict[str, list[dict[str, str]]] = {
    "python": [{}],
    "torchrun": [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for r in "01"],
}


@pytest.mark.parametrize("starter", list(STARTERS))
def test_other_launchers(model: Path, alpaca: Path, tmp_path: Path, starter: str):
    common = launch_environment()
    if starter == "torchrun":
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "TORCHELASTIC_RUN_ID": "none"}
    words, log = arguments(model, alpaca, "zero2", tmp_path / "out", "--max_steps", "2"), tmp_path / "log"
    ranks = [start_forked(run_script, str(TRAIN), words, common | own, str(log)) for own in STARTERS[starter]]
    for rank in ranks:
        rank.join(300)
        assert rank.exitcode == 0, log.read_text()[-4000:]
    summary = summary_of(tmp_path / "out")
    assert summary["steps"] == 2
    assert summary["world_size"] == len(ranks)
