"""Every recipe starts: the launcher with a tiny model of the recipe's architecture and a few rows of its layout."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaForSequenceClassification

from ds_moelora import MoELoRAConfig
from ds_moelora.cli import main
from launch.checks.arguments import parse_arguments
from launch.demo.base import byte_tokenizer
from tests.launch.test_launch_images import tiny_clip, write_pictures
from tests.support.launch_support import ROOT, launch, tiny_model, write_jsonl
from tests.support.vision_language import tiny_llava, write_questions

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
# What the header of the papers' recipes says for their other optimizer.
SGD = ["--deepspeed", "configs/zero2_papers_sgd.json", "--learning_rate", "3e-5",
       "--lr_scheduler_kwargs", '{"lr_end": 3e-6, "power": 1}']  # fmt: skip
RUNS = [*((path, []) for path in RECIPES), (ROOT / "configs" / "recipes" / "papers_glue.yaml", SGD)]
STEPS = 2
# load_in_4bit: test_launch_4bit.py, where bitsandbytes is installed.
NOT_HERE = ("dataset_config", "load_in_4bit")
pytestmark = pytest.mark.dist


def name_of(run: tuple[Path, list[str]]) -> str:
    return run[0].stem + ("_sgd" if run[1] else "")


def tiny_roberta(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, pad_token_id=tokenizer.pad_token_id, num_labels=2,
                           max_position_embeddings=300)  # fmt: skip
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(recipe: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Rows in the layout of the recipe's data set."""
    if name.startswith("chat"):
        turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(8)]
        return [{"messages": turn} for turn in turns]
    if name == "papers_scienceqa":
        return [{"question": f"{i}?", "choices": ["x", "y"], "answer": i % 2, "hint": "h" * (i % 2)} for i in range(8)]
    if name == "papers_commonsenseqa":
        choices = {"label": list("ABCDE"), "text": list("vwxyz")}
        return [{"question": f"{i}?", "choices": choices, "answerKey": "ABCDE"[i % 5]} for i in range(8)]
    if recipe.get("task") == "sequence-classification":
        return [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(8)]
    columns = [recipe.get(f"{name}_column", name) for name in ("instruction", "output")]
    return [{columns[0]: f"say {i}", columns[1]: f"it is {i}", "type": "other"} for i in range(8)]


def stand_ins(recipe: dict[str, Any], name: str, folder: Path) -> tuple[Path, Path]:
    """A model and data in the place of those that the recipe takes from the hub."""
    folder.mkdir()
    if recipe.get("task") == "image-classification":
        return tiny_clip(folder / "model"), write_pictures(folder / "data", 4)
    if recipe.get("task") == "image-text-to-text":
        return tiny_llava(folder / "model"), write_questions(folder / "data.parquet", 8)
    build = tiny_roberta if "roberta" in recipe["model_name_or_path"] else tiny_model
    return build(folder / "model"), write_jsonl(folder / "data.jsonl", rows_of(recipe, name))


def arguments_of(run: tuple[Path, list[str]], folder: Path) -> list[str]:
    path, more = run
    recipe = yaml.safe_load(path.read_text())
    model, data = stand_ins(recipe, path.stem, folder / name_of(run))
    if recipe.get("prompt_template") == "chat" or path.stem.startswith("chat"):
        turn = "{{ message.role + ':' + message.content + eos_token }}"
        (model / "chat_template.jinja").write_text(f"{{% for message in messages %}}{turn}{{% endfor %}}")
    own = folder / path.name
    own.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if name not in NOT_HERE}))
    arguments = ["--config", str(own), "--model_name_or_path", str(model), "--dataset_name", str(data),
                 "--output_dir", str(folder / name_of(run) / "out"), "--max_steps", str(STEPS), "--save_strategy", "no",
                 "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--logging_steps", "1",
                 "--max_grad_norm", "1"]  # fmt: skip
    if "eval_dataset_name" in recipe:
        arguments += ["--eval_dataset_name", str(data), "--eval_dataset_split", "train"]
    return [*arguments, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str | None]]:
    """All runs, one after the other in one process: their folder, and what ended each."""
    folder = tmp_path_factory.mktemp("recipes")
    runs = folder / "runs.json"
    runs.write_text(json.dumps([arguments_of(run, folder) for run in RUNS]))
    ended = launch([str(runs)], ranks=1, script=ROOT / "tests" / "support" / "several_runs.py")
    assert ended.code == 0, ended.output[-4000:]
    outcomes = json.loads(runs.with_suffix(".json.done").read_text())
    return folder, {name_of(run): outcome for run, outcome in zip(RUNS, outcomes, strict=True)}


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_the_recipe_starts(run: tuple[Path, list[str]], finished: tuple[Path, dict[str, str | None]]) -> None:
    folder, outcomes = finished
    assert outcomes[name_of(run)] is None, outcomes[name_of(run)]
    recipe, output = yaml.safe_load(run[0].read_text()), folder / name_of(run) / "out"
    summary = json.loads((output / "train_summary.json").read_text())
    assert summary["steps"] == STEPS
    assert math.isfinite(summary["last_loss"])
    saved = MoELoRAConfig.from_pretrained(str(output))
    assert (saved.num_experts, saved.top_k, saved.r) == (recipe["num_experts"], recipe["top_k"], recipe["r"])
    for name in ("init_lora_weights", "scaling", "eta", "rho", "lora_alpha", "lora_dropout", "router_aux_loss_coef"):
        assert getattr(saved, name) == recipe.get(name, getattr(saved, name)), name
    if run[0].stem.startswith("papers"):
        check_papers(run, recipe, summary, output)
    else:
        kind = json.loads((ROOT / recipe["deepspeed"]).read_text())["optimizer"]["type"]
        assert summary["optimizer"] == kind == ("GateRiemannianAdamW" if run[0].stem.startswith("chat") else "AdamW")


def check_papers(run: tuple[Path, list[str]], recipe: dict[str, Any], summary: dict[str, Any], output: Path) -> None:
    """20 experts, 10 of them used, on q, k, v and o alone; the optimizer, and its rate down to a tenth in a line."""
    assert (recipe["num_experts"], recipe["top_k"], recipe["r"], recipe["lora_alpha"]) == (20, 10, 4, 16)
    assert recipe["lora_dropout"] == 0.05
    batch = 8 * recipe["per_device_train_batch_size"] * recipe.get("gradient_accumulation_steps", 1)
    assert batch == 80  # on the 8 devices of the header's command
    rate, optimizer = (3e-5, "GateRiemannianSGD") if run[1] else (1e-5, "GateRiemannianAdamW")
    assert summary["optimizer"] == optimizer
    for entry in summary["log"]:
        assert entry["learning_rate"] == pytest.approx(rate * (1 - 0.9 * entry["step"] / STEPS), rel=1e-9)
    config = json.loads((ROOT / (run[1][1] if run[1] else recipe["deepspeed"])).read_text())
    assert config["optimizer"]["params"]["gate_lr_scale"] == 1e-3
    weights = load_file(output / "adapter_model.safetensors")
    adapted = {name.split(".moelora_experts")[0] for name in weights if "lora_B" in name}
    assert {name.rsplit(".", 1)[-1] for name in adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(adapted) == 4 * 2
    assert not any("vision" in name for name in weights)


@pytest.mark.parametrize("name", ["chat_7b_4bit", "chat_70b_zero3"])
def test_the_planner_writes_the_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in its header gives its figures and its flags, and the flags are the launcher's."""
    path = ROOT / "configs" / "recipes" / f"{name}.yaml"
    recipe, text = yaml.safe_load(path.read_text()), path.read_text().replace(" \\\n#      ", "")
    planned = re.search(r"^#   ds-moelora (plan .*)$", text, re.MULTILINE)[1].split()
    planned[planned.index("--model-config") + 1] = str(ROOT / planned[planned.index("--model-config") + 1])
    assert main([*planned, "--write", str(tmp_path / "recipe.yaml")]) == 0
    assert "deepspeed " in capsys.readouterr().out
    written = (tmp_path / "recipe.yaml").read_text()
    figures = re.compile(r"stage \d|[\d.]+ GB|[\d.]+ s per step|[\d.]+ B parameters|num_\w+ \d+")
    assert set(figures.findall(written)) == set(figures.findall(text))
    flags = yaml.safe_load(written)
    assert {**flags, **dict.fromkeys(("model_name_or_path", "dataset_name"))} == {
        **{key: recipe[key] for key in flags}, **dict.fromkeys(("model_name_or_path", "dataset_name"))
    }  # fmt: skip
    parsed = parse_arguments(["--config", str(path)], {})
    assert parsed.run.load_in_4bit == ("load_in_4bit" in recipe)
    stage = json.loads(Path(parsed.training.deepspeed).read_text())["zero_optimization"]["stage"]
    assert stage == (3 if name.endswith("zero3") else 0)


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"recommended", "goat_vit", "goat_glue", "goat_commonsense", "goat_math"} <= names
    assert {"papers_scienceqa", "papers_commonsenseqa", "papers_glue", "papers_vqa"} <= names
