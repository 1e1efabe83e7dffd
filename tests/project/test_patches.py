"""What `import ds_moelora` changes in other libraries: the list in `ds_moelora/patches.py`, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftModel, PeftType

from ds_moelora import patches
from ds_moelora.tuner import older_peft

LIBRARIES = ("torch", "deepspeed", "peft", "transformers", "accelerate", "safetensors", "huggingface_hub")
# Run in a process of its own: every attribute of every module and class of these libraries, before and after.
SURVEY = f"""
import sys, json, types, warnings
warnings.simplefilter("ignore")
import torch, deepspeed, peft, transformers, accelerate, torch.distributed
import deepspeed.runtime.engine, deepspeed.moe.layer, transformers.trainer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

def library(name):
    return isinstance(name, str) and name.split(".")[0] in {LIBRARIES!r}

def survey():
    found = {{}}
    for module in [m for n, m in list(sys.modules.items()) if library(n) and isinstance(m, types.ModuleType)]:
        owners = [(module.__name__, module)]
        owners += [(f"{{v.__module__}}:{{v.__qualname__}}", v) for v in list(vars(module).values())
                   if isinstance(v, type) and library(getattr(v, "__module__", None))]
        for name, owner in owners:
            found[name] = (owner, dict(vars(owner)))
    return found

def changes(before):
    found = set()
    for name, (owner, old) in before.items():
        new = dict(vars(owner))
        for key in old.keys() | new.keys():
            is_submodule = key not in old and isinstance(new.get(key), types.ModuleType)
            if old.get(key) is not new.get(key) and not is_submodule and not key.startswith(("__", "_abc_")):
                found.add(f"{{name}}.{{key}}")
    return sorted(found)

before, modules = survey(), set(sys.modules)
print("classes", sum(":" in n for n in before))
"""
REGISTERED = {
    "torch.optim.GateRiemannianAdamW",
    "torch.optim.GateRiemannianMuon",
    "torch.optim.GateRiemannianSGD",
    "peft.utils.peft_types:PeftType.MOELORA",
}


def places(listed: tuple[patches.Patch, ...]) -> set[str]:
    """Where the patches act, as the survey names it."""
    found = set()
    for patch in listed:
        owner = patch.find_owner()
        cls = isinstance(owner, type)
        found.add(f"{owner.__module__}:{owner.__qualname__}.{patch.name}" if cls else f"{owner.__name__}.{patch.name}")
    return found


def survey(code: str) -> list[set[str]]:
    command = [sys.executable, "-W", "ignore", "-c", SURVEY + code]
    root = Path(patches.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    lines = done.stdout.splitlines()
    assert next(int(line.split()[1]) for line in lines if line.startswith("classes")) > 1000
    return [set(json.loads(line)) for line in lines if line.startswith('["') or line == "[]"]


def test_the_import_changes_what_is_listed_and_nothing_else() -> None:
    at_import, loaded, later, other = survey("""
import ds_moelora
print(json.dumps(changes(before)))
print(json.dumps(sorted({m.split(".")[0] for m in set(sys.modules) - modules} - set(sys.stdlib_module_names))))
from ds_moelora import patches
patches.install_for_expert_parallelism()
ds_moelora.register()
print(json.dumps(changes(before)))
peft.PeftModel.forward = None
print(json.dumps(changes(before)))
""")
    listed = REGISTERED | places((*patches.PEFT, *patches.DEEPSPEED))
    assert at_import == listed
    assert loaded == {"ds_moelora"}
    assert later == listed | places(patches.expert_parallel())
    assert other == later | {"peft.peft_model:PeftModel.forward"}  # the survey would find another change


ALL = (*patches.PEFT, *patches.DEEPSPEED, *patches.expert_parallel())


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_every_patch_fits_here_and_says_why(patch: patches.Patch) -> None:
    assert patch.problem() is None
    assert len(patch.reason) > 40


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_other_versions_and_missing_functions_are_named(patch: patches.Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not there" in str(replace(patch, name="gone").problem())
    monkeypatch.setattr(patches.metadata, "version", lambda library: "99.0")
    assert (
        f"{patch.name} was made for {patch.library}>={patch.versions[0]},<{patch.versions[1]}, and this is 99.0"
        in str(patch.problem())
    )


def test_what_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches.metadata, "version", lambda library: "99.0")
    with pytest.warns(UserWarning, match=r"leaves out .*load_adapter was made for peft>=0\.18"):
        patches.install_at_import(with_deepspeed=True)
    with pytest.raises(ValueError, match=r"ep_size > 1 cannot be used here: .*clip_fp32_gradients was made for"):
        patches.install_for_expert_parallelism()


def test_an_older_peft_has_patches_of_its_own() -> None:
    """`make compat` runs with them; here they do not fit."""
    assert {(patch.owner, patch.name) for patch in patches.OLDER_PEFT} == {
        (place, f"{verb}_peft_model_state_dict") for place in older_peft.PLACES for verb in ("get", "set")
    }
    assert all(patch.problem() is None for patch in patches.OLDER_PEFT) == older_peft.IS_OLDER


def test_an_older_peft_does_without_expert_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    real = patches.metadata.version
    monkeypatch.setattr(patches.metadata, "version", lambda library: "0.20.0" if library == "peft" else real(library))
    with pytest.raises(ValueError, match=r"ep_size > 1 cannot .*save_pretrained was made for peft>=0\.21"):
        patches.install_for_expert_parallelism()


def test_installing_twice_wraps_once() -> None:
    before = [vars(PeftModel)[patch.name] for patch in patches.PEFT if patch.name in vars(PeftModel)]
    patches.install_at_import(with_deepspeed=True)
    assert [vars(PeftModel)[patch.name] for patch in patches.PEFT if patch.name in vars(PeftModel)] == before


def test_the_adapter_type_is_a_member_of_the_enum() -> None:
    member = PeftType("MOELORA")
    assert member is PeftType.MOELORA is PeftType["MOELORA"]
    assert (member.name, member.value, str(member)) == ("MOELORA", "MOELORA", "PeftType.MOELORA")
    assert member == "MOELORA"
    assert "MOELORA" in list(PeftType)
    assert [PeftType(t.value) for t in PeftType] == list(PeftType)
