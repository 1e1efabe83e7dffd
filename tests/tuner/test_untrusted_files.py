"""Adapters that anybody may have written: refused before anything is counted or allocated, in one line."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ds_moelora import MoELoRAConfig
from ds_moelora.cli import main
from ds_moelora.tuner.config import MOST_ENTRIES, MOST_EXPERTS, MOST_RANK
from ds_moelora.tuner.files.adapter_file import read_adapter

from ..support.adapter_support import adapted, llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUGE = 10**400  # beyond the largest float
SLOW = r"(([a-z_]+\.?)+)+!"  # a name of n letters takes 2^n steps
WRONG = {
    "num_experts": [10**11, MOST_EXPERTS + 1, -1, 0, True, "8", 2.5, [8], {"a": 1}, None, HUGE],
    "r": [10**11, MOST_RANK + 1, -4, HUGE, None, []],
    "top_k": [10**11, None, []],
    "lora_alpha": [float("nan"), float("inf"), HUGE, "16", None, [1]],
    "lora_dropout": [1.0, -0.1, "x", [[]]],
    "target_modules": [[1], [["q"]], {"a": 1}, 5, ["q"] * (MOST_ENTRIES + 1), [], "(", SLOW, ".*.*.*.*.*.*.*!"],
    "exclude_modules": [[{}], 7, "*", SLOW],
    "modules_to_save": [3, [3], {"a": 2}],
    "layers_to_transform": ["a", ["a"], [1.5], {}],
    "layers_pattern": [3],
    "rank_pattern": [
        *({"q": 10**11}, {"q": -1}, {"(": 4}, {SLOW: 4}, [["q", 4, 5]], "x", {"q": None}),
        {f"q{i}": 4 for i in range(MOST_ENTRIES + 1)},
    ],
    "num_experts_pattern": [{"q": 10**11}],
    "alpha_pattern": [{SLOW: 1.0}, {"q": HUGE}, {"q": float("nan")}],
    "scaling": [None, [], {}, "x" * 10**6],
    "init_lora_weights": [None, [], {}, 3, "x"],
    "router_temperature": [0, float("nan"), HUGE],
    "top_p": [1, float("nan"), "a"],
    "shared_expert": ["yes", None, 1],
    "ep_size": [10**11],
    "task_type": ["x", [], {}],
    "base_model_name_or_path": [{}, [1], 3],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(folder)
    return folder


def copied(saved: Path, folder: Path, config: Any = None, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {**json.loads((saved / CONFIG).read_text()), **fields} if config is None else config
    (folder / CONFIG).write_text(values if isinstance(values, str) else json.dumps(values))
    (folder / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    return folder


@pytest.mark.parametrize("field", WRONG)
def test_configurations_are_bounded(field: str, saved: Path, tmp_path: Path) -> None:
    for value in WRONG[field]:
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"\w") as direct:
            MoELoRAConfig(**{"target_modules": ["q_proj"], field: value})
        assert len(str(direct.value)) < 1000
        if value is not HUGE:  # JSON has it, as an integer of 400 digits; one spelling is enough
            folder = copied(saved, tmp_path / "adapter", **{field: value})
            with pytest.raises(ValueError, match=CONFIG):
                read_adapter(folder)
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "1e999", '{"peft_type": "MOELORA"', "[" * 100_000),
        *('{"peft_type": ["MOELORA"]}', '{"peft_type": "LORA"}', '{"peft_type": "MOELORA", "r": 1' + "0" * 5000 + "}"),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_commands_name_a_broken_configuration(
    command: str, text: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(saved, tmp_path / "adapter", config=text)
    output = [str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(folder), *output]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert CONFIG in error
    assert not (tmp_path / "out").exists()


def test_a_configuration_too_large_is_not_read(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "adapter")
    with (folder / CONFIG).open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(ValueError, match="has 1099511627776 bytes"):
        read_adapter(folder)


def test_loading_names_the_file(saved: Path, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` and `load_adapter`, before a module of the base model is replaced."""
    folder = copied(saved, tmp_path / "adapter")
    whole = (folder / WEIGHTS).read_bytes()
    model = PeftModel.from_pretrained(llama(), folder)
    for content in (whole[:-10], b"", whole[:4]):
        (folder / WEIGHTS).write_bytes(content)
        base = llama()
        with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or cut short"):
            PeftModel.from_pretrained(base, folder)
        assert not any("moelora" in name for name, _ in base.named_modules())
        with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or cut short"):
            model.load_adapter(str(folder), "second")
        assert list(model.peft_config) == ["default"]
    for text in ("{", '{"peft_type": ["MOELORA"]}', '{"r": 4}'):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=f"{CONFIG} cannot be used"):
            PeftModel.from_pretrained(llama(), str(folder))
    copied(saved, folder, num_experts=10**11)
    with pytest.raises(ValueError, match=f"{CONFIG} cannot be used: num_experts=100000000000 must be at most"):
        PeftModel.from_pretrained(llama(), str(folder))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_named_or_harmless(seed: int, saved: Path, tmp_path: Path) -> None:
    """Cut, overwritten, or with bytes too many: the error names the file, or the shapes are the configuration's."""
    draw = random.Random(seed)
    folder = copied(saved, tmp_path / "adapter")
    file = folder / draw.choice([CONFIG, WEIGHTS])
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content) if file.name == CONFIG else 4000)
    kind = draw.choice(["cut", "overwrite", "insert"])
    if kind == "cut":
        content = content[:at]
    elif kind == "overwrite":
        content[at] = draw.randrange(256)
    else:
        content[at:at] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 50)))
    file.write_bytes(content)
    try:
        adapter = read_adapter(folder)
    except ValueError as error:
        named = (str(folder), "lacks", "has no experts", "by the configuration")
        assert any(part in str(error) for part in named), error  # noqa: PT017
    else:
        for layer in adapter.layers:
            assert layer.lora_B.shape[::2] == (layer.config.num_experts, layer.config.r)


def test_few_bytes_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """Many experts of rank 1 on one feature: products are compared row by row."""
    from ds_moelora.tuner.files.inspection import layer_facts

    E, prefix = 256, "base_model.model.q_proj.moelora_experts."
    MoELoRAConfig(num_experts=E, r=1, target_modules=["q_proj"]).save_pretrained(tmp_path)
    factors = {"lora_A": torch.ones(E, 1, 1), "lora_B": torch.ones(E, 1, 1), "router.weight": torch.ones(E, 1)}
    save_file({prefix + name: tensor for name, tensor in factors.items()}, tmp_path / WEIGHTS)
    (layer,) = read_adapter(tmp_path).layers
    assert layer_facts(layer).similarity == pytest.approx(1)


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;owned\x07", "[red]\u202eq[/red]", ":warning: \r\n x"])
def test_names_do_not_command_the_terminal(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(saved, tmp_path / "adapter", base_model_name_or_path=name)
    tensors = load_file(folder / WEIGHTS)
    renamed = {key.replace("self_attn.q_proj", f"self_attn.{name}"): tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    assert main(["inspect", str(folder), "--layers", "--experts", "layers"]) == 0
    assert main(["inspect", str(folder), "--experts", "nowhere"]) == 2
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    shown = "".join(capsys.readouterr())
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[red]" in shown or "[red]" not in name
    assert ":warning:" in shown or ":warning:" not in name
