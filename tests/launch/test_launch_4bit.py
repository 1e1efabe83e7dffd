"""--load_in_4bit: errors, and runs under ZeRO-2 where bitsandbytes is installed."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checks.arguments import parse_arguments
from launch.checks.errors import UserError
from launch.checks.preflight import preflight
from tests.launch.test_launch_runs import adapter_of, arguments, summary_of
from tests.support.launch_support import alpaca_rows, assert_same_adapter, launch, tiny_model, write_jsonl

# On CPUs bitsandbytes 0.50.2 dequantises rows shorter than its blocks wrongly.
BLOCK = 64
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install bitsandbytes"
)


@pytest.mark.parametrize(
    ("config", "installed", "message"),
    [
        ("zero2", False, "pip install bitsandbytes"),
        ("zero3", True, "--load_in_4bit with configs/zero3.json: ZeRO stage 3"),
        ("zero2", True, None),
    ],
)
def test_what_stands_in_the_way_is_named(
    config: str, installed: bool, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    found = object() if installed else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: found if name == "bitsandbytes" else find(name, *more)
    )
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--load_in_4bit", "--output_dir", str(tmp_path)]
    arguments = parse_arguments([*flags, "--deepspeed", f"configs/{config}.json"], {})
    if message is None:
        preflight(arguments)
    else:
        with pytest.raises(UserError, match=message):
            preflight(arguments)


@pytest.mark.dist
@needs_bitsandbytes
def test_a_4bit_base_trains_and_an_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    """Two ranks, ZeRO-2. On CPUs bitsandbytes would repack the weights in the first evaluation."""
    model = tiny_model(tmp_path / "model", hidden_size=BLOCK)
    data = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(24))
    more = ("--load_in_4bit", "--max_steps", "4", "--eval_fraction", "0.25", "--save_strategy", "no")
    for name, flags in (("plain", ()), ("evaluated", ("--eval_strategy", "steps", "--eval_steps", "1"))):
        finished = launch(arguments(model, data, "zero2", tmp_path / name, *more, *flags))
        assert finished.code == 0, finished.output[-4000:]
        summary = summary_of(tmp_path / name)
        assert summary["last_loss"] < summary["first_loss"]
        assert math.isfinite(summary["eval"]["eval_loss"])
        assert all(tensor.dtype == torch.float32 for tensor in adapter_of(tmp_path / name).values())
    assert_same_adapter(tmp_path / "plain", tmp_path / "evaluated")


@needs_bitsandbytes
@pytest.mark.parametrize("init", ["true", "goat"])
def test_the_base_is_in_4_bits_and_stays_readable(tmp_path: Path, init: str) -> None:
    """After an inference the weights still dequantise to what they were, within NF4's rounding of the original."""
    import bitsandbytes

    from launch.training import modeling
    from launch.training.processors import processor_of_run

    folder = tiny_model(tmp_path / "model", hidden_size=BLOCK)
    parsed = parse_arguments(["--model_name_or_path", str(folder), "--dataset_name", "d", "--load_in_4bit",
                              "--num_experts", "2", "--lora_r", "2", "--init_lora_weights", init], {})  # fmt: skip
    config = modeling.adapter_config(parsed.adapter, "causal-lm")
    model = modeling.load_model(parsed, config, {}, processor_of_run(parsed)).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 2 * 7

    def dequantised() -> dict[str, torch.Tensor]:
        return {
            name: bitsandbytes.functional.dequantize_4bit(m.weight.data, m.weight.quant_state).float()
            for name, m in layers.items()
        }

    before = dequantised()
    with torch.no_grad():
        first = model(input_ids=torch.arange(8)[None]).logits
        assert torch.isfinite(first).all()
    stored = load_file(folder / "model.safetensors")
    for name, weight in dequantised().items():
        assert torch.equal(weight, before[name]), name
        original = stored[name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"]
        assert (weight - original).norm() < 0.12 * original.norm(), name  # the nearest of NF4's values: 0.09
