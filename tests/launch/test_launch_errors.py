"""Bad input: one message that names the value and the remedy, before torch.distributed opens or a model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch import train
from launch.checks import errors
from launch.checks.errors import UserError
from launch.training import modeling
from tests.support.launch_support import ROOT, alpaca_rows, launch, tiny_model, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def good(model: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings with nothing wrong; each test breaks one."""
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(8))),
        "deepspeed": str(ROOT / "configs" / "zero2.json"),
        "output_dir": str(tmp_path / "out"),
    }


class PassedError(Exception):
    """The checks found nothing."""


@pytest.fixture(autouse=True)
def stop_after_checks(monkeypatch: pytest.MonkeyPatch):
    """Whoever gets past the checks meets this instead of torch.distributed and the weights."""

    def stop(*args: Any) -> None:
        raise PassedError

    monkeypatch.setattr(train, "start", stop)
    monkeypatch.setattr(modeling, "load_model", stop)


def run(settings: dict[str, Any]) -> None:
    argv: list[str] = []
    for name, value in settings.items():
        if value is not None:
            argv += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    train.main(argv)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ep_size": 3}, r"--ep_size=3 must divide .* num_experts=8 on 4 ranks these sizes do: 1, 2, 4\."),
        ({"ep_size": 0}, "--ep_size 0 must be at least 1"),
        ({"ep_size": 2, "deepspeed": "configs/zero3.json"}, "--ep_size 2 with configs/zero3.json: ZeRO stage 3"),
        ({"ep_size": 2, "deepspeed": None, "optim": "adamw_torch"}, "--ep_size 2 needs DeepSpeed"),
        ({"ep_size": 2, "ep_dispatch": "all"}, "ep_dispatch='all' is unknown"),
    ],
)
def test_expert_parallel_sizes(
    good: dict[str, Any], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=message):
        run({**good, **changes})


def test_expert_parallel_settings_pass(good: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(PassedError):
        run({**good, "ep_size": 2, "deepspeed": str(ROOT / "configs" / "zero2_ep.json")})


def test_good_input_passes(good: dict[str, Any]):
    with pytest.raises(PassedError):
        run(good)
    assert not Path(good["output_dir"]).exists(), "checking must not write"


ADAPTER = [
    ({"top_k": 9, "num_experts": 4}, ["top_k", "9", "4"]),
    ({"init_lora_weights": "magic"}, ["init_lora_weights", "magic"]),
    ({"target_modules": ["nowhere"]}, ["nowhere", "q_proj", "down_proj"]),
    ({"target_modules": [r".*\.nowhere$"]}, ["nowhere", "q_proj"]),
    ({"target_modules": ["embed_tokens"]}, ["embed_tokens"]),
]
RUN = [
    ({"dataset_name": "gone.jsonl"}, ["--dataset_name", "gone.jsonl", "no such file"]),
    ({"model_name_or_path": "/gone/model"}, ["--model_name_or_path", "/gone/model"]),
    ({"deepspeed": "configs/zero4.json"}, ["zero4.json", "no such file", "configs/zero2.json"]),
    ({"deepspeed": None}, ["--deepspeed", "--optim"]),
    ({"optim": "adamw_torch"}, ["--optim", "no effect"]),
    ({"eval_strategy": "epoch"}, ["--eval_dataset_name", "--eval_fraction"]),
    ({"score": "answers"}, ["--eval_dataset_name", "--eval_fraction"]),
    ({"eval_fraction": 2}, ["--eval_fraction", "2"]),
    ({"status_file": "/nowhere/file"}, ["--status_file", "/nowhere"]),
    ({"max_train_samples": 0}, ["--max_train_samples", "0"]),
    ({"loss_type": "dft"}, ["dft"]),
    ({"resume_from_checkpoint": "gone"}, ["--resume_from_checkpoint", "gone", "no checkpoint"]),
    ({"resume_from_checkpoint": "true"}, ["--resume_from_checkpoint", "no checkpoint-* folder"]),
]


@pytest.mark.parametrize(("change", "words"), [*ADAPTER, *RUN])
def test_bad_settings(good: dict[str, Any], change: dict[str, Any], words: list[str]):
    with pytest.raises(UserError) as caught:
        run({**good, **change})
    for word in words:
        assert word in str(caught.value)
    assert not dist.is_initialized()


OPTIMIZERS = [
    ({"type": "GateRiemanianAdamW", "params": {}}, ["GateRiemanianAdamW", "GateRiemannianAdamW"]),
    ({"type": "AdanW", "params": {}}, ["AdanW", "adamw"]),
    ({"type": "Zzzzzz"}, ["Zzzzzz", "GateRiemannianAdamW"]),
    ({"params": {}}, ['"type"']),
    ({"type": "GateRiemannianAdamW", "params": {"damping": "auto"}}, ["damping", "auto"]),
    ({"type": "GateRiemannianAdamW", "params": {"damping": -1}}, ["damping", "-1"]),
    ({"type": "GateRiemannianAdamW", "params": {"gate_scaling": "cube"}}, ["gate_scaling", "cube", "sqrt"]),
    ({"type": "GateRiemannianAdamW", "params": {"dampening": 1}}, ["dampening", "damping"]),
    ({"type": "GateRiemannianSGD", "params": {"betas": [0.9, 0.9]}}, ["betas", "momentum"]),
    (None, ['no "optimizer" block', "--optim"]),
]


@pytest.mark.parametrize(("block", "words"), OPTIMIZERS)
def test_bad_optimizer_blocks(good: dict[str, Any], tmp_path: Path, block: dict[str, Any] | None, words: list[str]):
    config = json.loads(Path(good["deepspeed"]).read_text())
    config.pop("optimizer")
    if block is not None:
        config["optimizer"] = block
    (tmp_path / "ds.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        run({**good, "deepspeed": tmp_path / "ds.json"})
    for word in words:
        assert word in str(caught.value)


def test_optim_is_accepted_where_it_has_an_effect(good: dict[str, Any]):
    with pytest.raises(PassedError):
        run({**good, "deepspeed": None, "optim": "adamw_torch"})


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"a": 1,\n  "b" 2}', ["not JSON", "line 2", "column 7"]), ("[1, 2]", ["list"]), ("", ["not JSON", "line 1"])],
)
def test_bad_deepspeed_files(good: dict[str, Any], tmp_path: Path, text: str, words: list[str]):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError) as caught:
        run({**good, "deepspeed": tmp_path / "ds.json"})
    for word in words:
        assert word in str(caught.value)


def test_non_empty_output_dir(good: dict[str, Any]):
    output_dir = Path(good["output_dir"])
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty") as caught:
        run(good)
    assert "--resume_from_checkpoint" in str(caught.value)
    assert "--overwrite_output_dir" in str(caught.value)
    with pytest.raises(PassedError):
        run({**good, "overwrite_output_dir": "true"})
    assert (output_dir / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("kind", "code"), [(errors.UserError, 1), (errors.UsageError, 2), (RuntimeError, 1)])
def test_a_failure_is_one_message_and_an_exit_code(
    kind: type[Exception], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def fail() -> None:
        raise kind("what is wrong")

    with pytest.raises(SystemExit) as caught:
        errors.run_guarded(fail, debug=False)
    assert caught.value.code == code
    message = capsys.readouterr().err
    assert "[rank 0] error: " in message
    assert "Traceback" not in message
    # In training what nobody foresaw keeps its traceback: a long run may not be there to be repeated.
    monkeypatch.setattr(errors, "_training", True)
    with pytest.raises(SystemExit):
        errors.run_guarded(fail, debug=False)
    assert ("Traceback" in capsys.readouterr().err) == (kind is RuntimeError)
    monkeypatch.setattr(errors, "_training", False)
    with pytest.raises(SystemExit):
        errors.run_guarded(fail, debug=True)
    assert "Traceback" in capsys.readouterr().err


FAILING_SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import launch.train as train

def fail(*args, **kwargs):
    raise RuntimeError("rank 1 alone")

if os.environ["RANK"] == "1":
    train.prepare = fail
train.run_guarded(train.main, debug=False)
"""


@pytest.mark.dist
def test_a_failure_of_one_rank_before_the_others_wait_ends_all(good: dict[str, Any], tmp_path: Path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING_SCRIPT)
    finished = launch([word for name, value in good.items() for word in (f"--{name}", value)], script=script)
    assert finished.code != 0
    assert re.search(r"\[rank 1\] error: RuntimeError: .*rank 1 alone", finished.output), finished.output[-4000:]
