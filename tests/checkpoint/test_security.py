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
from ds_moelora.checkpoint.manifest import describe_files, files_in, has_manifest, write_manifest
from launch import train
from launch.checks.errors import UserError
from launch.training import modeling
from tests.support.launch_support import ROOT, alpaca_rows, launch, tiny_model, write_jsonl

# Every file of a checkpoint that some library may unpickle; `*` stands for the rest of a name.
KINDS = (
    *(
        "global_step2/*_optim_states.pt",
        "global_step2/mp_rank_00_model_states.pt",
        "rng_state_0.pth",
        "rng_state_1.pth",
    ),
    *("scheduler.pt", "optimizer.pt", "scaler.pt", "pytorch_model.bin", "adapter_model.bin", "deeper/any.pt"),
)


class Malicious:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


class StartedError(Exception):
    """The checks found nothing."""


@pytest.fixture(scope="module")
def run_before(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of two ranks that left checkpoint-2; returns its flags."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--model_name_or_path", str(tiny_model(folder / "model")), "--output_dir", str(folder / "out")]
    flags += ["--dataset_name", str(write_jsonl(folder / "rows.jsonl", alpaca_rows(16)))]
    flags += ["--deepspeed", "configs/zero2.json", "--per_device_train_batch_size", "2", "--save_steps", "2"]
    finished = launch([*flags, "--max_steps", "2"])
    assert finished.code == 0, finished.output[-3000:]
    return flags


@pytest.fixture
def resumed(run_before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """Flags that resume a copy of that checkpoint, and the copy; whoever gets past the checks raises StartedError."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(Path(run_before[3]) / "checkpoint-2", checkpoint)

    def stop(*_: Any) -> None:
        raise StartedError

    monkeypatch.setattr(train, "start", stop)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return [*run_before, "--max_steps", "4", "--resume_from_checkpoint", str(checkpoint)], checkpoint


def plant(folder: Path, kind: str, marker: Path) -> Path:
    found = next(iter(sorted(folder.glob(kind))), folder / kind)
    found.parent.mkdir(exist_ok=True)
    torch.save({"state": Malicious(marker)}, found)
    if has_manifest(folder):  # which whoever changes a file can change as well
        write_manifest(folder, describe_files(folder, files_in(folder)))
    return found


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_code_in_a_checkpoint_is_named_and_not_run(
    resumed: tuple[list[str], Path], kind: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    flags, checkpoint = resumed
    with pytest.raises(StartedError):
        train.main(flags)
    planted = plant(checkpoint, kind, tmp_path / "marker")
    with pytest.raises(UserError, match=r"holds more than data.*--unsafe_checkpoints") as caught:
        train.main(flags)
    assert str(planted) in str(caught.value)
    assert "mkdir" in str(caught.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.dist
def test_the_flag_is_needed_and_warns(
    resumed: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    flags, checkpoint = resumed
    plant(checkpoint, KINDS[0], tmp_path / "marker")
    with pytest.raises(StartedError):
        train.main([*flags, "--unsafe_checkpoints"])
    assert "WARNING: --unsafe_checkpoints" in capsys.readouterr().out


@pytest.mark.dist
def test_real_ranks_refuse_and_resume(run_before: list[str], tmp_path: Path) -> None:
    checkpoint = Path(run_before[3]) / "checkpoint-2"
    plant(checkpoint, "training_args.bin", tmp_path / "marker")  # which is never read
    flags = [*run_before, "--resume_from_checkpoint", str(checkpoint)]
    finished = launch([*flags, "--max_steps", "4"])
    assert finished.code == 0, finished.output[-3000:]
    planted = plant(checkpoint, "global_step2/*rank_1*_optim_states.pt", tmp_path / "marker")
    finished = launch([*flags, "--max_steps", "4"])
    assert finished.code != 0
    for rank in (0, 1):
        assert f"[rank {rank}] error: --resume_from_checkpoint: {planted} holds more than data" in finished.output
    assert "Traceback" not in finished.output
    assert not (tmp_path / "marker").exists()


def test_while_loading_too(tmp_path: Path) -> None:
    """DeepSpeed's engine asks for weights_only=False; inside `data_only` nobody gets it."""
    planted = plant(tmp_path, "states.pt", tmp_path / "marker")
    with data_only(), pytest.raises(ValueError, match=r"states\.pt holds more than data"):
        torch.load(planted, weights_only=False)
    assert not (tmp_path / "marker").exists()
    torch.load(planted, weights_only=False)
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
        with data_only(), pytest.raises(ValueError, match=r"other.pt holds more than data"):
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
