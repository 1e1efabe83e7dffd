"""`init-adapter`: the folder holds what `get_peft_model` starts with, and training can go on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from ds_moelora import MoELoRAConfig
from ds_moelora.cli import main

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (
            ["--shared_expert", "--rank_pattern", '{"q_proj": 3}'],
            {"shared_expert": True, "rank_pattern": {"q_proj": 3}},
        ),
        (["--init_lora_weights", "goat"], {"init_lora_weights": "goat"}),
        (["--modules_to_save", "lm_head"], {"modules_to_save": ["lm_head"]}),
    ],
    ids=["plain", "options", "goat", "modules_to_save"],
)
def test_folder_is_the_start(flags: list[str], options: dict, base: str, tmp_path: Path) -> None:
    """Bit-equal to `get_peft_model` with the same seed; with is_trainable=True a step changes experts and router."""
    start = str(tmp_path / "start")
    targets = ["--target_modules", "q_proj", "up_proj", "--num_experts", "4", "--lora_r", "2"]
    assert main(["init-adapter", "--model", base, "--output", start, "--seed", "3", *targets, *flags]) == 0
    config = MoELoRAConfig(target_modules=["q_proj", "up_proj"], num_experts=4, r=2, task_type="CAUSAL_LM", **options)
    set_seed(3)
    expected = get_peft_model_state_dict(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), start, is_trainable=True).train()
    found = get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("router" in name for name in before)
    tokens = torch.arange(20).view(2, 10)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = {
        name.split(".")[-2 if "weight" in name else -1]
        for name, p in model.named_parameters()
        if name in before and not p.equal(before[name])
    }
    assert {"lora_B", "router"} <= moved


def test_mistakes_are_one_line(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for flags, message in (
        (["--output", str(tmp_path / "full")], "not an empty folder"),
        (["--target_modules", "q_prj"], "Did you mean"),
        (["--top_k", "9"], "top_k=9 is larger than num_experts=8"),
        (["--rank_pattern", "q=1"], "--rank_pattern q=1 is not JSON"),
        (["--dtype", "half-precision"], "--dtype half-precision is unknown"),
        (["--model", str(tmp_path / "nowhere")], "cannot be loaded"),
    ):
        argv = ["init-adapter", "--model", base, "--output", str(tmp_path / "new"), *flags]
        assert main(argv) == 2, flags
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert message in line
        assert not (tmp_path / "new").exists()
