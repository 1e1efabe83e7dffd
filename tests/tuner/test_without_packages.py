"""What is saved, in a process without DeepSpeed, and in one without this package; each starts once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ds_moelora import GateRiemannianAdamW, tag_lora_pairs, use_lora_experts
from ds_moelora.tuner.files.export import export_adapter

from ..support.adapter_support import adapted, batch, llama
from ..support.base_experts import base_model, lora_model, tokens
from ..support.goat import GOAT, logits, train
from .test_base_experts import run
from .test_export import saved_mixture

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, folder: Path, *arguments: str) -> Any:
    """What a program that runs in `folder` has printed last, as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_MOELORA_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WITHOUT_DEEPSPEED = """
import json, sys
sys.modules["deepspeed"] = None
import torch, ds_moelora
from peft import PeftModel
from tests.support.adapter_support import batch, llama
found = {"cuda": torch.cuda.is_initialized(), "optimizer": ds_moelora.GateRiemannianAdamW.__name__}
for name in ("mixture", "goat"):
    with torch.no_grad():
        logits = PeftModel.from_pretrained(llama(), name)(**batch()).logits
    found[name] = (logits - torch.load(name + ".pt")).abs().max().item()
print(json.dumps(found))
"""


def test_adapters_load_without_deepspeed(tmp_path: Path) -> None:
    for name, options in (("mixture", {}), ("goat", GOAT)):
        model = train(adapted(**options), batch())
        model.save_pretrained(tmp_path / name)
        torch.save(logits(model, batch()), tmp_path / f"{name}.pt")
    found = run_python(WITHOUT_DEEPSPEED, tmp_path)
    assert (found["cuda"], found["optimizer"], found["mixture"]) == (False, "GateRiemannianAdamW", 0)
    assert found["goat"] < 1e-5


WITHOUT_THE_PACKAGE = """
import json, sys, warnings
sys.modules["ds_moelora"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

def load(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()

warnings.filterwarnings("error", category=UserWarning, module="peft")
for part in sys.argv[1:]:
    load("llama", "parts/" + part)
torch.save(load("moe", "lora")(input_ids=torch.load("tokens.pt")).logits, "logits.pt")
try:
    load("llama", "mixture")
except KeyError as error:
    print(json.dumps(str(error)))
"""


def test_what_peft_alone_loads(tmp_path: Path) -> None:
    """The exported parts; LoRA on a MoE base that this package has trained; of a mixture it says what to install."""
    saved_mixture(tmp_path / "mixture", init_lora_weights="goat")
    parts = export_adapter(tmp_path / "mixture", tmp_path / "parts")
    assert len(parts) == 5
    llama().save_pretrained(tmp_path / "llama")
    model = lora_model("qwen3_moe")
    base_model("qwen3_moe").save_pretrained(tmp_path / "moe")
    use_lora_experts(model)
    tag_lora_pairs(model)
    optimizer = GateRiemannianAdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(3):
        run(model)
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "lora")
    torch.save(tokens(), tmp_path / "tokens.pt")
    said = run_python(WITHOUT_THE_PACKAGE, tmp_path, *parts)
    assert "pip install ds_moelora; if it is installed, import ds_moelora before loading" in said
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), model(input_ids=tokens()).logits, atol=1e-5)
