"""Nothing that a checkpoint, an adapter or a model brings is executed."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ds_moelora import check_data_only, data_only
from launch import train
from launch.checks.errors import UserError
from launch.training import modeling
from tests.support.failures import undisturbed_run
from tests.support.launch_support import ROOT, alpaca_rows, tiny_model, write_jsonl


class Malicious:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def plant(folder: Path, kind: str, marker: Path) -> Path:
    found = next(iter(sorted(folder.glob(kind))), folder / kind)
    found.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state": Malicious(marker)}, found)
    return found


@pytest.mark.parametrize("name", ["x.pt", "global_step2/zero_pp_rank_1_optim_states.pt", "deeper/any.pth", "a.bin"])
def test_code_in_a_checkpoint_is_named_and_not_run(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    torch.save({"x": torch.ones(3)}, folder / "sound.pt")
    check_data_only(folder)
    planted = plant(folder, name, tmp_path / "marker")
    with pytest.raises(ValueError, match=rf"{name} holds more than data.*mkdir"):
        check_data_only(folder)
    assert planted.is_file()
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_file_that_was_cut_short_is_named(kept: float, tmp_path: Path) -> None:
    """Of an interrupted save; DeepSpeed says only that there is one."""
    torch.save({"x": torch.randn(1000)}, tmp_path / "rank_0_states.pt")
    check_data_only(tmp_path)
    data = (tmp_path / "rank_0_states.pt").read_bytes()
    (tmp_path / "rank_0_states.pt").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"rank_0_states\.pt is incomplete.*checkpoint before it"):
        check_data_only(tmp_path)


@pytest.mark.dist
def test_a_checkpoint_of_the_launcher_holds_no_pickle(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = undisturbed_run(tmp_path_factory.getbasetemp()).reference
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert not suffixes & {".pt", ".pth", ".bin", ".pkl"}
    assert ".safetensors" in suffixes


def test_while_loading_too(tmp_path: Path) -> None:
    """DeepSpeed's engine asks for weights_only=False; inside `data_only` torch's own switch overrules it."""
    load = torch.load
    planted = plant(tmp_path, "states.pt", tmp_path / "marker")
    with pytest.raises(ValueError, match=r"states\.pt holds more than data"), data_only():
        torch.load(planted, weights_only=False)
    assert not (tmp_path / "marker").exists()
    assert torch.load is load
    torch.load(planted, weights_only=False)
    assert (tmp_path / "marker").exists()
    assert (tmp_path / "marker").exists(), "the test's own pickle does nothing"


def test_the_dynamic_loss_scale_is_data(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(2**14, 2.0, 1000, 1, 2, False)
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = 2.0**13, 7, 5
    torch.save({"loss_scaler": scaler}, tmp_path / "x.pt")
    check_data_only(tmp_path)
    with data_only():
        loaded = torch.load(tmp_path / "x.pt", weights_only=False)["loss_scaler"]
    assert vars(loaded) == vars(scaler)


class Attribute:
    """A pickle of it calls getattr, as Python 3.11.2's pickles of Enum members do."""

    def __init__(self, owner: type, name: str) -> None:
        self.what = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.what


def test_getattr_reaches_members_of_enums_alone(tmp_path: Path) -> None:
    member = tmp_path / "member.pt"
    torch.save({"stage": Attribute(ZeroStageEnum, "gradients")}, member)
    with data_only():
        assert torch.load(member)["stage"] is ZeroStageEnum.gradients
    for owner, name in ((DynamicLossScaler, "__init__"), (ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro")):
        torch.save({"stage": Attribute(owner, name)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=r"other.pt holds more than data"), data_only():
            torch.load(tmp_path / "other.pt")


def test_an_adapter_in_torch_format(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MOELORA", "target_modules": ["q_proj"]}))
    plant(tmp_path, "adapter_model.bin", tmp_path / "marker")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path))
    assert not (tmp_path / "marker").exists()


def _trains(model: Path, tmp_path: Path, *more: str) -> list[str]:
    rows = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(4))
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    return [*flags, "--deepspeed", "configs/zero2.json", *more]


def test_a_base_model_in_torch_format(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    planted = plant(model, "pytorch_model.bin", tmp_path / "marker")
    with pytest.raises(UserError, match=f"--model_name_or_path: {planted} holds more than data"):
        train.main(_trains(model, tmp_path))
    assert not (tmp_path / "marker").exists()


def test_a_models_own_code_runs_by_flag_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, marker = tiny_model(tmp_path / "model"), tmp_path / "marker"
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        f"import os\nfrom transformers import LlamaConfig\nos.mkdir({str(marker)!r})\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'unheard_of'\n"
    )
    monkeypatch.setattr(modeling, "load_model", lambda *_: None)
    with pytest.raises(UserError, match="--trust_remote_code"):
        train.main(_trains(model, tmp_path))
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 (its class is no model; what counts is that its file was run)
        train.main(_trains(model, tmp_path, "--trust_remote_code", "true"))
    assert marker.exists()


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [p for suffix in ("*.sh", "*.sbatch") for p in ROOT.rglob(suffix) if ".venv" not in str(p)]
    scripts.append(ROOT / ".ci" / "run")
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    found = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


FORBIDDEN = {
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "eval",
    "exec",
    "subprocess.getoutput",
}


def unsafe_calls(path: Path) -> list[str]:
    """Calls that hand a string to a shell, run code from a string, or unpickle."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unpickles = name == "torch.load" and options.get("weights_only") != "True" and path.name != "data_only.py"
        if name in FORBIDDEN or unpickles or options.get("shell", "False") != "False":
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node):.80}")
    return found


def test_no_shell_and_no_unpickling_in_the_sources() -> None:
    sources = [*(ROOT / "launch").rglob("*.py"), *(ROOT / "ds_moelora").rglob("*.py"), ROOT / "setup.py"]
    assert [call for path in sources for call in unsafe_calls(path)] == []


def test_the_search_finds_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.checkpoint.test_security.ROOT", tmp_path)
    (tmp_path / "x.py").write_text(
        "import os\nos.system('ls')\nsubprocess.run('ls', shell=True)\ntorch.load('x')\neval('1')\n"
    )
    assert len(unsafe_calls(tmp_path / "x.py")) == 4
