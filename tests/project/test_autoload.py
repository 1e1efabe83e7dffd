"""The entry point that torch calls: names are found without an import, and everything else is as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import ds_moelora_autoload
from ds_moelora.optimizer.guard import OURS
from ds_moelora.plugin import OPTIMIZERS
from ds_moelora.tuner.files.loading import LoadUnderWay
from ds_moelora.tuner.start import svd_init

from ..support.adapter_support import adapted, batch, config, llama
from ..support.goat import GOAT
from ..support.versions import TRANSFORMERS_LOADS_NO_ADAPTER

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINT = "[torch.backends]\nds_moelora = ds_moelora_autoload:autoload\n"  # test_packaging.py: the wheel's


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which Python finds this package as installed."""
    root = tmp_path_factory.mktemp("installed")
    folder = root / "ds_moelora-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ds_moelora\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINT)
    return root


# One process imports all but this package; each program then runs in a fork of it.
FORKS = """
import json, os, sys, torch, peft, transformers, deepspeed
for name, program in json.loads(sys.stdin.read()).items():
    print("\\n#", name, flush=True)
    child = os.fork()
    if child == 0:
        exec(program, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def run_python(code: str, *path: Path, given: str = "", **env: str) -> list[str]:
    """The lines that begin with "> " or "# "."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "DS_ACCELERATOR": "cpu", **env}
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=env, timeout=300, cwd=path[0])
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line[:2] in ("> ", "# ")]


def run_forks(programs: dict[str, str], *path: Path, **env: str) -> dict[str, list[str]]:
    """The lines of each program that begin with "> "."""
    found: dict[str, list[str]] = {}
    for line in run_python(FORKS, *path, given=json.dumps(programs), **env):
        if line.startswith("# "):
            lines = found[line[2:]] = []
        else:
            lines.append(line)
    return found


@pytest.fixture(scope="module")
def printed(installed: Path) -> dict[str, list[str]]:
    """What each program prints where the package is installed."""
    programs = {"look-ups": LOOK_UPS, "asks": ASKS, "engine": ENGINE}
    llama().save_pretrained(installed / "base")
    torch.save(batch(), installed / "batch.pt")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(installed / "base"), config(**GOAT))
    model.save_pretrained(installed / "goat")
    with torch.no_grad():
        torch.save(model.eval()(**batch()).logits, installed / "logits.pt")
    for loader, call in LOADERS.items():
        if loader != "transformers" or not TRANSFORMERS_LOADS_NO_ADAPTER:
            programs[loader] = LOAD.format(call=call)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return run_forks(programs, installed, ROOT, **ranks)


LOOK_UPS = """
import sys, json, torch
found = {"at first": "ds_moelora" in sys.modules}
try:
    torch.optim.Gate
except AttributeError as error:
    found["torch"] = [str(error), error.name, error.obj is torch.optim]
import peft
try:
    peft.PEFT_TYPE_TO_CONFIG_MAPPING["MOE"]
except KeyError as error:
    found["peft"] = error.args
found["LoRA"] = peft.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"].__name__
found["after look-ups"] = "ds_moelora" in sys.modules
print("> " + json.dumps(found))
"""


def test_it_knows_all_optimizers() -> None:
    assert ds_moelora_autoload.OPTIMIZERS == OURS == tuple(optimizer.__name__ for optimizer in OPTIMIZERS)


ASKS = """
import sys, torch, peft
try:
    print("> " + peft.PEFT_TYPE_TO_CONFIG_MAPPING["MOELORA"].__name__)
except KeyError as error:
    print("> " + str(error))
try:
    print("> " + torch.optim.GateRiemannianSGD.__module__)
except AttributeError as error:
    print("> " + str(error))
"""


def test_our_names_are_found(printed: dict[str, list[str]]) -> None:
    assert printed["asks"] == ["> MoELoRAConfig", "> ds_moelora.optimizer.riemannian"]


def test_switched_off_it_finds_nothing_and_other_names_are_looked_up_alike(
    installed: Path, printed: dict[str, list[str]]
) -> None:
    off = run_forks({"look-ups": LOOK_UPS, "asks": ASKS}, installed, ROOT, DS_MOELORA_AUTOLOAD="0")
    assert off["asks"] == ["> 'MOELORA'", "> module 'torch.optim' has no attribute 'GateRiemannianSGD'"]
    assert printed["look-ups"] == off["look-ups"]
    assert not json.loads(off["look-ups"][0][2:])["after look-ups"]


def test_a_package_that_cannot_be_imported_does_not_disturb_torch(installed: Path) -> None:
    broken = installed / "broken"
    (broken / "ds_moelora").mkdir(parents=True)
    (broken / "ds_moelora" / "__init__.py").write_text("raise OSError('the disk is gone')\n")
    (broken / "ds_moelora_autoload.py").symlink_to(ROOT / "ds_moelora_autoload.py")
    code = """
import torch
print(">", torch.ones(2).sum().item(), hasattr(torch.optim, "Other"))
for _ in range(2):
    try:
        torch.optim.GateRiemannianAdamW
    except OSError as error:
        print(">", error)
"""
    assert run_python(code, installed, broken) == ["> 2.0 False", *["> the disk is gone"] * 2]


def test_its_own_failure_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "torch.optim")
    ds_moelora_autoload.autoload()
    assert "ds_moelora is not found by name here" in caplog.text
    caplog.clear()
    ds_moelora_autoload._watch_types(types.ModuleType("peft.mapping"))  # without the table
    assert "ds_moelora is not found by name here" in caplog.text


def test_another_packages_look_up_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = types.ModuleType("torch.optim")
    optim.__getattr__ = lambda name: f"theirs: {name}"  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "torch.optim", optim)
    for _ in range(2):
        ds_moelora_autoload.autoload()
        assert optim.Other == "theirs: Other"
    assert optim.__getattr__.__module__ == "ds_moelora_autoload"


ENGINE = """
import torch, deepspeed
from peft import LoraConfig, get_peft_model
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config={
    "train_batch_size": 1, "zero_optimization": {"stage": 2}, "optimizer": {"type": "GateRiemannianAdamW"}})
engine.backward(engine(torch.ones(1, 4)).sum())
engine.step()
print("\\n>", type(engine.basic_optimizer).__name__, len(engine.basic_optimizer._factors))
"""


def test_one_word_in_a_deepspeed_config_is_all(printed: dict[str, list[str]]) -> None:
    assert printed["engine"] == ["> GateRiemannianAdamW 2"]


LOADERS = {
    "PEFT": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "goat")',
    "transformers": 'AutoModelForCausalLM.from_pretrained("goat")',  # and so pipeline(model="adapter")
}
LOAD = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = {call}.eval()
with torch.no_grad():
    difference = model(**torch.load("batch.pt")).logits - torch.load("logits.pt")
print("\\n>", difference.abs().max().item() < 1e-5, model.peft_config["default"].weights_follow)
"""


@pytest.mark.parametrize("loader", LOADERS)
def test_an_adapter_is_loaded_without_an_import(loader: str, printed: dict[str, list[str]]) -> None:
    if loader == "transformers" and TRANSFORMERS_LOADS_NO_ADAPTER:
        pytest.skip(TRANSFORMERS_LOADS_NO_ADAPTER)
    assert printed[loader] == ["> True False"]


def test_the_first_load_decomposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(llama, **GOAT).save_pretrained(tmp_path)
    saved = LoadUnderWay.from_pretrained(tmp_path)

    def decompose(*args: object) -> None:
        raise AssertionError("decomposed a weight")

    monkeypatch.setattr(svd_init, "singular_triplets", decompose)
    get_peft_model(llama(), saved)
    saved.weights_follow = False
    with pytest.raises(ValueError, match="decomposed a weight"):
        get_peft_model(llama(), saved)
