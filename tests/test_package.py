"""The package as a whole: import direction, registration, and what an import costs and needs."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ds_moelora

ROOT = Path(ds_moelora.__file__).parent
# Who may import what. `plugin.py` and `__init__.py` know everything inside the package.
ALLOWED = {
    "core": {"torch"},
    "parallel": {"torch", "deepspeed", "safetensors", "core", "parallel"},
    "adapters": {"torch", "peft", "transformers", "huggingface_hub", "safetensors", "core", "adapters"},
    "optim": {"torch", "core", "parallel", "optim"},
    "monitoring": {
        *("torch", "transformers", "numpy", "PIL"),
        *("core", "adapters", "optim", "parallel", "monitoring"),
    },
    "planning": {"torch", "transformers", "adapters", "parallel", "planning"},
    "cli": {"transformers", "rich", "adapters", "planning", "cli"},
}
ALLOWED["core"] |= {"core"}


def imports(path: Path) -> set[str]:
    """Packages outside the standard library, and this package's own folders, that a file imports."""
    found = set()
    package = path.relative_to(ROOT.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names = [f"{base}{node.module or ''}"]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "ds_moelora" and len(parts) > 1 else parts[0])
    return found - set(sys.stdlib_module_names) - {""}


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_direction(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) <= ALLOWED[folder], path


def test_only_parallel_and_plugin_name_deepspeed() -> None:
    users = {p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py") if "deepspeed" in imports(p)}
    assert users <= {"parallel", "plugin.py"}


def test_public_names() -> None:
    expected = {
        "GateRiemannianAdamW",
        "GateRiemannianSGD",
        "MoELoRAConfig",
        "MoELoRAModel",
        "__version__",
        "check_data_only",
        "data_only",
        "gather_experts",
        "load_elastic",
        "save_elastic",
        "register",
        "save_without_residual",
        "tag_lora_pairs",
    }
    assert set(ds_moelora.__all__) == expected
    assert all(hasattr(ds_moelora, name) for name in expected)


def test_registration_is_idempotent() -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    before = list(ZERO_SUPPORTED_OPTIMIZERS)
    ds_moelora.register()
    ds_moelora.register()
    assert before == ZERO_SUPPORTED_OPTIMIZERS
    assert torch.optim.GateRiemannianAdamW is ds_moelora.GateRiemannianAdamW
    assert torch.optim.GateRiemannianSGD is ds_moelora.GateRiemannianSGD
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOELORA"] is ds_moelora.MoELoRAModel


def test_a_name_taken_by_somebody_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "GateRiemannianSGD", torch.optim.SGD)
    with pytest.raises(RuntimeError, match="already taken"):
        ds_moelora.register()


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    ).stdout.strip()


def test_imports_without_deepspeed_and_without_a_gpu() -> None:
    code = """
import sys
sys.modules["deepspeed"] = None
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *a: None if name == "deepspeed" else find(name, *a)
import torch, ds_moelora
p = torch.nn.Linear(2, 2)
print(torch.cuda.is_initialized(), ds_moelora.GateRiemannianAdamW.__name__, ds_moelora.MoELoRAConfig().peft_type)
"""
    assert run_python(code) == "False GateRiemannianAdamW MOELORA"


def test_import_loads_nothing_that_its_dependencies_do_not() -> None:
    """Modules beyond those of DeepSpeed and PEFT are the package's own."""
    code = """
import sys
import torch, deepspeed, peft, peft.tuners.lora, safetensors
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
before = set(sys.modules)
import ds_moelora
new = {m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new))
"""
    assert run_python(code).splitlines()[-1] == "['ds_moelora']"


def test_version_is_the_one_that_setup_reads() -> None:
    text = (ROOT.parent / "setup.py").read_text()
    assert "__version__" in text
    assert importlib.metadata.version("ds_moelora") == ds_moelora.__version__
