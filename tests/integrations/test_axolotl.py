"""The axolotl plugin's check of the optimizer, beside a stand-in for axolotl's two base classes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ds_moelora import GateRiemannianSGD


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin, base.AdapterCapabilities = object, SimpleNamespace  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "ds_moelora.integrations.axolotl", raising=False)
    yield importlib.import_module("ds_moelora.integrations.axolotl").Plugin()
    del sys.modules["ds_moelora.integrations.axolotl"]


@pytest.mark.parametrize("as_file", [True, False])
def test_another_optimizer_is_refused(plugin: Any, as_file: bool, tmp_path: Path) -> None:
    config: Any = {"optimizer": {"type": "GateRiemannianSGD"}}
    if as_file:
        (tmp_path / "ds.json").write_text(json.dumps(config))
        config = str(tmp_path / "ds.json")
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(deepspeed=config), None)
    params = [torch.nn.Parameter(torch.zeros(2))]
    ours = SimpleNamespace(optimizer=SimpleNamespace(optimizer=object.__new__(GateRiemannianSGD)))
    callback.on_train_begin(None, None, None, optimizer=ours)
    for other, name in ((SimpleNamespace(optimizer=torch.optim.AdamW(params)), "AdamW"), (None, "no optimizer")):
        with pytest.raises(ValueError, match=f"asks for GateRiemannianSGD, but {name} is about to train"):
            callback.on_train_begin(None, None, None, optimizer=other)


@pytest.mark.parametrize("config", [None, {}, {"optimizer": {"type": "AdamW"}}])
def test_other_configs_are_not_watched(plugin: Any, config: Any) -> None:
    assert plugin.add_callbacks_pre_trainer(SimpleNamespace(deepspeed=config), None) == []


def test_the_mixture_of_the_yaml(plugin: Any) -> None:
    options = {
        "lora_r": 3,
        "lora_alpha": 6,
        "lora_dropout": None,
        "lora_target_linear": None,
        "lora_modules_to_save": None,
    }
    cfg = SimpleNamespace(adapter="moelora", lora_target_modules=["q_proj"], moelora={"num_experts": 5}, **options)
    _, config = plugin.load_adapter(None, cfg, config_only=True)
    assert (config.r, config.lora_alpha, config.num_experts, config.target_modules) == (3, 6, 5, {"q_proj"})
    assert plugin.load_adapter(None, SimpleNamespace(adapter="lora")) is None
