"""Flags, recipes and their precedence."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import PeftConfig

import ds_moelora
from ds_moelora import MoELoRAConfig
from ds_moelora.optimizer.defaults import DAMPING, LEARNING_RATES, OTHERS
from ds_moelora.tuner.config import PATTERNS
from launch.checks.arguments import parse_arguments
from launch.checks.deepspeed_config import check_optimizer
from launch.checks.errors import UsageError, UserError
from launch.checks.flags import AdapterArguments, CausalConfig, ClassificationConfig
from launch.training.modeling import adapter_config
from tests.support.launch_support import ROOT

NAMED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def test_nothing_named_means_the_demo_with_its_defaults():
    arguments = parse_arguments(["--deepspeed", "configs/zero2.json"], {"num_experts": 5, "max_length": 24})
    assert arguments.demo
    assert arguments.adapter.num_experts == 5
    assert arguments.training.max_length == 24


def test_a_flag_wins_over_the_demo_defaults():
    assert parse_arguments(["--num_experts", "3"], {"num_experts": 5}).adapter.num_experts == 3


def test_task_decides_the_training_arguments():
    assert isinstance(parse_arguments(NAMED, {}).training, CausalConfig)
    classification = parse_arguments([*NAMED, "--task", "sequence-classification"], {}).training
    assert isinstance(classification, ClassificationConfig)
    assert not isinstance(classification, CausalConfig)


def test_tensorboard_is_on_by_default_and_remote_code_off():
    for task in ("causal-lm", "sequence-classification"):
        training = parse_arguments([*NAMED, "--task", task], {}).training
        assert training.report_to == "tensorboard"
        assert training.trust_remote_code is False


@pytest.mark.parametrize(("words", "value"), [([], None), (["--bf16"], True), (["--bf16", "false"], False)])
def test_a_flag_of_three_values_may_stand_alone(words: list[str], value: bool | None):
    assert parse_arguments([*NAMED, *words, "--seed", "3"], {}).training.bf16 is value


@pytest.mark.parametrize(
    ("config", "words", "rate"),
    [
        ("zero2", [], LEARNING_RATES["GateRiemannianAdamW"]),
        ("zero2_papers_sgd", [], LEARNING_RATES["GateRiemannianSGD"]),
        ("zero2_adamw", [], LEARNING_RATES["AdamW"]),
        ("zero2", ["--lr", "3e-4"], 3e-4),
        (None, ["--optim", "adamw_torch"], LEARNING_RATES["AdamW"]),
        (None, ["--optim", "adafactor"], OTHERS),
    ],
)
def test_the_learning_rate_is_the_optimizers_own(config: str | None, words: list[str], rate: float):
    words = [*words, *(["--deepspeed", f"configs/{config}.json"] if config else [])]
    arguments = parse_arguments([*NAMED, *words], {})
    check_optimizer(arguments)
    assert arguments.training.learning_rate == rate


def test_library_and_launcher_have_the_same_defaults():
    for name, rate in LEARNING_RATES.items():
        if hasattr(ds_moelora, name):
            known = inspect.signature(getattr(ds_moelora, name)).parameters
            assert (known["lr"].default, known["damping"].default) == (rate, DAMPING)
    for path in (ROOT / "configs").glob("*.json"):
        params = json.loads(path.read_text())["optimizer"]["params"]
        assert params.get("damping", DAMPING) == DAMPING, path.name


def test_help_is_about_the_command_at_hand(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--deepspeed", "configs/zero2_papers_sgd.json", "--help"], {"learning_rate": 7.0, "r": 99})
    text = capsys.readouterr().out
    titles = ("model, data and run:", "the mixture of", "training, most used:", "scoring:", "all other flags")
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert re.search(r"--lr LEARNING_RATE\s+Peak rate.*?\(default: 0\.01\)", text, re.DOTALL)
    assert "99" not in text[places[1] : places[2]], "the demo's"


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_command_line_wins_over_recipe(tmp_path: Path, form: list[str]):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndataset_name: d\nr: 3\ntop_k: 1\n"
        "learning_rate: 5.0e-3\ntarget_modules: [q_proj, v_proj]\n"
    )
    arguments = parse_arguments([*[part.format(recipe) for part in form], "--r", "6"], {})
    assert (arguments.adapter.r, arguments.adapter.top_k) == (6, 1)
    assert arguments.training.learning_rate == 5e-3
    assert arguments.adapter.target_modules == ["q_proj", "v_proj"]
    assert not arguments.demo


def test_recipe_can_choose_the_task(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: sequence-classification\nmodel_name_or_path: m\ndataset_name: d\n")
    arguments = parse_arguments(["--config", str(recipe)], {})
    assert arguments.run.task == "sequence-classification"
    assert isinstance(arguments.training, ClassificationConfig)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*NAMED, "--numexperts", "3"], ["numexperts", "--num_experts"]),
        ([*NAMED, "--num_exp", "3"], ["num_exp"]),
        ([*NAMED, "--r", "many"], ["--r", "many"]),
        ([*NAMED, "--r", "3", "stray"], ["stray"]),
        (["--task", "translation"], ["translation", "causal-lm"]),
        (["--model_name_or_path", "m"], ["--dataset_name"]),
        (["--dataset_name", "d"], ["--model_name_or_path"]),
        (["--task", "sequence-classification"], ["--model_name_or_path", "--dataset_name"]),
        ([*NAMED, "--task", "sequence-classification", "--packing", "true"], ["packing"]),
        (["--config"], ["YAML"]),
    ],
)
def test_usage_errors(argv: list[str], words: list[str]):
    with pytest.raises(UsageError) as caught:
        parse_arguments(argv, {})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nmu_experts: 3\n", ["nmu_experts", "num_experts"]),
        ("- a\n- b\n", ["list"]),
        ("a: [1\n", ["not YAML", "line"]),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, words: list[str]):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_arguments(["--config", str(recipe), *NAMED], {})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload"])
def test_configs_leave_to_transformers_what_it_fills_in(name: str):
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert config["optimizer"]["type"] == "GateRiemannianAdamW"
    autos = {key for key, value in config["optimizer"]["params"].items() if value == "auto"}
    assert autos == {"lr", "betas", "eps", "weight_decay"}
    # DeepSpeed clips at 1.0 when this key is missing.
    assert config["gradient_clipping"] == "auto"
    readme = (ROOT / "configs" / "README.md").read_text()
    for key in _keys(config):
        assert f"`{key}`" in readme, f"configs/README.md does not explain {key}"


def _keys(config: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in config.items():
        names += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def test_routing_options_from_flags_and_recipes_reach_the_config(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: m\ndataset_name: d\ntop_p: 0.7\nnum_experts_pattern: {'layers\\.0\\..*': 4, q_proj: 6}\n"
    )
    argv = ["--config", str(recipe), "--shared_A", "--rank_pattern", '{"q_proj": 3}', "--router_jitter", "0.01"]
    config = adapter_config(parse_arguments(argv, {}).adapter, "causal-lm")
    assert (config.top_p, config.shared_A, config.shared_expert, config.router_jitter) == (0.7, True, False, 0.01)
    assert config.rank_pattern == {"q_proj": 3}
    assert config.num_experts_pattern == {r"layers\.0\..*": 4, "q_proj": 6}
    for value, message in (
        ("q_proj=3", "--rank_pattern q_proj=3 is not JSON"),
        ('{"q": 0}', "must be an integer >= 1"),
    ):
        arguments = parse_arguments([*NAMED, "--rank_pattern", value], {})
        with pytest.raises(UserError, match=message):
            adapter_config(arguments.adapter, "causal-lm")


def test_every_field_of_the_adapter_is_a_flag_with_its_default() -> None:
    """A new option of `MoELoRAConfig` needs no line in the launcher."""
    flags = {item.name: item for item in fields(AdapterArguments)}
    own = {item.name: item for item in fields(MoELoRAConfig) if item.name not in {f.name for f in fields(PeftConfig)}}
    assert own.keys() - flags.keys() == {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",  # launch/training/base_experts.py: of PEFT's LoRA as well
        "trained_with",
    }
    assert flags.keys() <= own.keys()
    spelled = {"target_modules", "init_lora_weights", "modules_to_save", *PATTERNS}
    for name in flags.keys() - spelled:
        assert flags[name].default == own[name].default
        assert flags[name].metadata["help"] == own[name].metadata["help"]
