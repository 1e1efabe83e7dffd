"""What of `make front-ends` is quick: TRL's own script, and that the comparison there compares something."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.front_ends import assets
from benchmarks.front_ends.__main__ import LIMIT, LM_EVAL, TORCHRUN, all_cases, deviation
from benchmarks.front_ends.table import render
from ds_moelora import MoELoRAConfig
from launch.cluster.processes import find_free_port
from tests.support.forks import run_script, start_forked
from tests.support.launch_support import launch_environment

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "front_ends.md"
RESULTS = ROOT / "benchmarks" / "results" / "front_ends.csv"


@pytest.mark.parametrize(
    "config",
    [LoraConfig(**assets.ADAPTER), MoELoRAConfig(num_experts=assets.NUM_EXPERTS, **assets.ADAPTER)],
    ids=["LoRA", "MoE-LoRA"],
)
def test_shards_cut_a_matrix(config: LoraConfig | MoELoRAConfig) -> None:
    """ZeRO pads to a multiple of twice the processes, and halves: within a row of a factor."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=258, num_attention_heads=2, **assets.SIZES))
    params = [(name, p) for name, p in get_peft_model(model, config).named_parameters() if p.requires_grad]
    offset = -(-sum(p.numel() for _, p in params) // 4) * 2
    while offset >= params[0][1].numel():
        offset -= params.pop(0)[1].numel()
    assert "lora_" in params[0][0]
    assert offset % params[0][1].shape[-1]


SFT = "import runpy\nrunpy.run_module('trl.scripts.sft', run_name='__main__', alter_sys=True)\n"


def run_forked(command: str, name: str, folder: Path, **variables: str) -> Path:
    """The adapter that a command on two processes writes: forked, where `make front-ends` starts it by torchrun."""
    out, log = folder / name, folder / f"{name}.log"
    command = command.removeprefix(TORCHRUN).replace("{out}", str(out)).replace("assets/", f"{folder}/assets/")
    (folder / "sft.py").write_text(SFT)
    script, *words = command.replace(" -m trl.scripts.sft", str(folder / "sft.py"), command.startswith(" -m")).split()
    common = {**launch_environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **variables}
    common["MASTER_PORT"] = str(find_free_port())
    numbers = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    ranks = [start_forked(run_script, script, words, common | own, str(log)) for own in numbers]
    for rank in ranks:
        rank.join(LIMIT)
        assert rank.exitcode == 0, log.read_text()[-4000:]
    return out


@pytest.mark.dist
def test_trl(tmp_path: Path) -> None:
    """`python -m trl.scripts.sft` as it stands, at stage 2."""
    assets.write(tmp_path / "assets")
    (case,) = (case for case in all_cases() if "trl.scripts.sft" in case.what)
    unsharded, adamw = (run_forked(case.reference, name, tmp_path, UNSHARDED=name) for name in (assets.OURS, "AdamW"))
    sharded = run_forked(case.command.replace("{stage}", "2"), "sharded", tmp_path)
    assert deviation(sharded, unsharded) < 1e-5  # fp32, 4 steps; eps is 1e-3
    assert deviation(adamw, unsharded) > 1e-2


def test_page_shows_the_results() -> None:
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    assert render(rows) in PAGE.read_text()
    known = {(case.front_end, case.what, case.adapter) for case in all_cases()} | {tuple(LM_EVAL.values())[:3]}
    assert {(row["front_end"], row["what"], row["adapter"]) for row in rows} <= known
    assert all(float(row["deviation"]) < 1e-5 for row in rows)
