"""Experts that start from a PEFT LoRA: the mixture is the LoRA's function, and what cannot be is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ds_moelora import MoELoRAConfig, start_from_lora
from tests.support.launch_support import tiny_model
from tests.support.ranks import run_on_ranks
from tests.support.training import engine_config

IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def save_lora(base: Path, folder: Path, **options: Any) -> Path:
    torch.manual_seed(3)
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config)).save_pretrained(folder)
    return folder


def mixture(base: Path, inside: Any = None, **options: Any) -> PeftModel:
    """`inside`: a context for making the adapter."""
    fields = {"r": 3, "num_experts": 4, "top_k": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(base)
    with inside or nullcontext():
        return get_peft_model(model, MoELoRAConfig(**{**fields, **options}))


@pytest.mark.parametrize("options", [
    {}, {"top_k": 4}, {"num_experts": 1, "top_k": 1}, {"r": 5, "scaling": "rslora"}, {"shared_A": True},
    {"top_p": 0.6, "shared_expert": True}, {"target_modules": "all-linear"},
])  # fmt: skip
@torch.no_grad()
def test_the_mixture_is_the_lora(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_lora(base, tmp_path / "lora", use_rslora="r" in options)
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(input_ids=IDS).logits
    model = mixture(base, **options).eval()
    plain = model(input_ids=IDS).logits
    assert (plain - wanted).abs().max() > 1e-2, "otherwise this would show nothing"
    assert start_from_lora(model, folder) == 4
    # float32, and sums in another order.
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_experts_part(base: Path, tmp_path: Path) -> None:
    """Equal at the start, different after a step: they see different tokens."""
    model = mixture(base)
    start_from_lora(model, save_lora(base, tmp_path / "lora"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, factor in model.named_parameters():
        if "lora_" in name:
            assert all(not torch.equal(factor[0], other) for other in factor[1:]), name


def spread_logits(base: str, lora: str) -> dict[str, torch.Tensor]:
    """On each of two processes: the mixture's logits, its experts shared out, or cut up by ZeRO-3 as they are made."""
    import deepspeed

    def logits(model: PeftModel, stage: int) -> torch.Tensor:
        start_from_lora(model, lora)
        params = [p for p in model.parameters() if p.requires_grad]
        config = engine_config(stage, "GateRiemannianAdamW")
        engine = deepspeed.initialize(model=model, model_parameters=params, config=config)[0]
        engine.eval()
        with torch.no_grad():
            return engine(input_ids=IDS).logits

    found = {"ep_size 2": logits(mixture(Path(base), ep_size=2), 2)}
    torch.manual_seed(dist.get_rank())  # what one process alone has would show
    cut = deepspeed.zero.Init(config_dict_or_path=engine_config(3, "GateRiemannianAdamW"), dtype=torch.float32)
    return found | {"stage 3": logits(mixture(Path(base), inside=cut, r=5), 3)}


@pytest.mark.dist
def test_the_mixture_is_the_lora_where_experts_are_spread(base: Path, tmp_path: Path) -> None:
    folder = save_lora(base, tmp_path / "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    wanted = model(input_ids=IDS).logits.detach()
    for found in run_on_ranks(2, spread_logits, base=str(base), lora=str(folder)):
        assert found.keys() == {"ep_size 2", "stage 3"}
        for logits in found.values():
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lora", "options", "message"), [
    ({}, {"r": 2}, "has rank 3, more than r=2 of .*; use r=3 or more"),
    ({}, {"target_modules": ["q_proj"]}, r"adapts .*down_proj.*, and the mixture does not"),
    ({}, {"init_lora_weights": "goat", "scaling": "goat"}, "starts from singular values"),
    ({"use_dora": True}, {}, "it has DoRA"),
    ({"rank_pattern": {"q_proj": 2}}, {}, "it has ranks per layer"),
    ({"modules_to_save": ["lm_head"]}, {}, "it trains biases or whole modules too"),
])  # fmt: skip
def test_what_would_be_lost_is_refused(
    base: Path, tmp_path: Path, lora: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = save_lora(base, tmp_path / "lora", **lora)
    if options.get("scaling") == "goat":
        options = {**options, "target_modules": ["q_proj", "down_proj"]}
    with pytest.raises(ValueError, match=message):
        start_from_lora(mixture(base, **options), folder)


def test_no_lora_is_refused(base: Path, tmp_path: Path) -> None:
    model = mixture(base)
    with pytest.raises(ValueError, match=r"it has no adapter_config.json"):
        start_from_lora(model, tmp_path)
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match="Name the folder of a PEFT LoRA"):
        start_from_lora(model, tmp_path / "mixture")
