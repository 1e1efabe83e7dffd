"""The package as a whole: import direction, registration, and what an import costs and needs."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import torch

import ds_moelora

ROOT = Path(ds_moelora.__file__).parent
# The written direction (docs/architecture.md): a subject imports those before it, and itself.
DIRECTION = (
    "redaction",
    "pairs",
    "mixture",
    "optimizer",
    "expert_parallel",
    "checkpoint",
    "tuner",
    "integrations",
    "monitoring",
    "planner",
    "cli",
)
# Beside each other: neither knows the other.
SIBLINGS = ({"optimizer", "expert_parallel"}, {"integrations", "monitoring", "planner"})
# Libraries outside the standard one, by subject.
LIBRARIES = {
    "redaction": set(),
    "pairs": {"torch"},
    "mixture": {"torch", "triton"},
    "optimizer": {"torch", "triton"},
    "expert_parallel": {"torch", "deepspeed"},
    "checkpoint": {"torch", "deepspeed", "safetensors"},
    "tuner": {"torch", "peft", "transformers", "huggingface_hub", "safetensors", "deepspeed"},
    "integrations": {"torch", "peft", "transformers", "deepspeed", "axolotl", "swift", "pydantic"},
    "monitoring": {"torch", "transformers", "numpy", "PIL"},
    "planner": {"torch", "transformers", "huggingface_hub"},
    "cli": {"transformers", "rich", "yaml", "ds_moelora_command"},
}


def imported_modules(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; of `from m import n` both m and m.n."""
    found = set()
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def subject(name: str) -> str:
    """The folder or top-level module of this package that a dotted name lies in; another package's first part."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ds_moelora" and len(parts) > 1 else parts[0]


def files_of(name: str) -> list[Path]:
    return sorted((ROOT / name).rglob("*.py")) or [path for path in [ROOT / f"{name}.py"] if path.exists()]


@pytest.mark.parametrize("name", [name for name in DIRECTION if files_of(name)])
def test_import_direction(name: str) -> None:
    before = set(DIRECTION[: DIRECTION.index(name)]) | {name}
    for group in SIBLINGS:
        if name in group:
            before -= group - {name}
    for path in files_of(name):
        used = {subject(module) for module in imported_modules(path)} - set(sys.stdlib_module_names)
        assert used <= before | LIBRARIES[name], path


def test_who_knows_all() -> None:
    """`plugin` and `patches` may import every subject; of the package's files only `__init__` imports `plugin`."""
    importers = {
        name: {
            p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py") if f"ds_moelora.{name}" in imported_modules(p)
        }
        for name in ("plugin", "patches")
    }
    assert importers == {"plugin": {"__init__.py"}, "patches": {"plugin.py"}}
    used = {subject(module) for module in imported_modules(ROOT / "patches.py")} - set(sys.stdlib_module_names)
    assert used <= {*DIRECTION, "peft", "packaging"}


def test_every_folder_is_in_the_direction() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders <= set(DIRECTION)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules that lie on circles, or lead from one to another."""
    left = dict(graph)
    while free := [m for m in left if not left[m] & left.keys() - {m}]:
        for m in free:
            del left[m]
    while ends := [m for m in left if not any(m in left[o] for o in left if o != m)]:
        for m in ends:
            del left[m]
    return sorted(left)


def module_graph(folder: Path) -> dict[str, set[str]]:
    """Module -> modules of the same tree that it imports, at its top or inside a function."""
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in files.items():
        imported = {m for m in imported_modules(path) if m in files} - {name}
        # `from package import module` names the package too, whose __init__ may import this file.
        graph[name] = {m for m in imported if not any(o.startswith(m + ".") for o in imported | {name})}
    return graph


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file: `f`, `C`, `C.m` and `m`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
            found |= methods | {f"{node.name}.{m}" for m in methods}
    return found


STOP = re.compile(r"^\| (\d) \| (?:`(\S+\.py)`, `(\S+)`|[^|`]*(?:`[^`]+`)?) \| ", re.MULTILINE)


def test_the_walks_of_the_architecture_page_name_what_is_there() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    walks = [section for section in page.split("\n## ") if "step by step" in section.splitlines()[0]]
    assert len(walks) == 2
    for walk in walks:
        stops = STOP.findall(walk)
        assert [int(number) for number, _, _ in stops] == list(range(1, len(stops) + 1))
        assert len(stops) <= 8
        ours = [(path, name) for _, path, name in stops if path]
        assert len(ours) >= 6  # the others are DeepSpeed's and torch's
        for path, name in ours:
            assert name in definitions(ROOT / path), f"{path}: {name}"


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert circle({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("folder", [ROOT, ROOT.parent / "launch"], ids=["package", "launcher"])
def test_no_import_circles(folder: Path) -> None:
    assert circle(module_graph(folder)) == []


def test_public_names() -> None:
    expected = {
        "GateRiemannianAdamW",
        "GateRiemannianMuon",
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
        "start_from_lora",
        "tag_lora_pairs",
        "use_lora_experts",
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


def test_version_is_the_one_that_setup_reads() -> None:
    text = (ROOT.parent / "setup.py").read_text()
    assert "__version__" in text
    assert importlib.metadata.version("ds_moelora") == ds_moelora.__version__
