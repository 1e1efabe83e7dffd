"""Resume and settings: whatever differs between two runs is refused or said, unless it cannot matter."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ds_moelora import GateRiemannianAdamW
from ds_moelora.checkpoint.record import (
    IGNORE,
    REFUSE,
    SAY,
    compare,
    refuse_others,
    run_record,
    sample_weights,
    verdict,
)
from ds_moelora.checkpoint.trained import Run
from ds_moelora.redaction import is_secret
from launch.checkpoint.record import IGNORED, TABLE, before_loading, data_record, settings
from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.flags import TASKS, TRAINING_CLASSES, AdapterArguments, RunArguments, ScoringArguments
from launch.training.modeling import adapter_config

FLAGS = ["--model_name_or_path", "m", "--dataset_name", "d", "--target_modules", "q_proj"]
FLAGS += ["--deepspeed", "configs/zero2.json", "--r", "2", "--num_experts", "4"]
# Adapter flags that say how the same mixture is computed or prepared.
SAME_MIXTURE = {"svd_cache_dir", "ep_size", "ep_dispatch", "expert_compute"}
MODEL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def parsed(*more: str) -> Arguments:
    return parse_arguments([*FLAGS, *more], {})


def record(arguments: Arguments, rows: int = 8, seed: int = 0, lr: float = 1e-3, **model: Any) -> dict[str, Any]:
    """What a checkpoint of a run would record."""
    torch.manual_seed(seed)
    module = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**{**MODEL, **model})), adapter_config(arguments.adapter, "causal-lm")
    )
    optimizer = GateRiemannianAdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    data = Dataset.from_list([{"input_ids": [i, 2, 3]} for i in range(rows)])
    return {
        **settings(arguments),
        **data_record(data),
        **run_record(Run(module=module, wrapper=optimizer, optimizer=optimizer)),
    }


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    return json.loads(json.dumps(record(parsed())))


def test_the_same_run_differs_in_nothing(saved: dict[str, Any]) -> None:
    assert compare(saved, record(parsed()), TABLE) == []
    assert before_loading(saved, parsed(), adapter_config(parsed().adapter, "causal-lm")) == []


PAIRS = {
    "r": (("--r", "3"), REFUSE, "adapter.default.r 2 -> 3"),
    "experts": (("--num_experts", "2"), REFUSE, "adapter.default.num_experts 4 -> 2"),
    "top_k": (("--top_k", "1"), REFUSE, "adapter.default.top_k 2 -> 1"),
    "alpha": (("--lora_alpha", "64"), REFUSE, "adapter.default.lora_alpha 16.0 -> 64.0"),
    "targets": (("--target_modules", "k_proj"), REFUSE, "adapter.default.target_modules"),
    "shared": (("--shared_expert", "true"), REFUSE, "shared_expert"),
    "temperature": (("--router_temperature", "2"), REFUSE, "router_temperature"),
    "dropout": (("--lora_dropout", "0.1"), SAY, "lora_dropout 0.0 -> 0.1"),
    "balance": (("--router_aux_loss_coef", "0.5"), SAY, "router_aux_loss_coef 0.001 -> 0.5"),
    "rate": (("--learning_rate", "0.5"), SAY, "flag.learning_rate"),
    "steps": (("--max_steps", "77"), SAY, "flag.max_steps"),
    "seed": (("--seed", "5"), SAY, "flag.seed 42 -> 5"),
    "data": (("--dataset_name", "e"), SAY, "flag.dataset_name"),
    "template": (("--prompt_template", "plain"), SAY, "flag.prompt_template"),
    "stage": (("--deepspeed", "configs/zero3.json"), IGNORE, ""),
    "place": (("--output_dir", "elsewhere"), IGNORE, ""),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_pairs_of_runs(name: str, saved: dict[str, Any]) -> None:
    flags, expected, text = PAIRS[name]
    arguments = parsed(*flags)
    found = compare(saved, record(arguments), TABLE)
    assert {d.verdict for d in found} == (set() if expected == IGNORE else {expected})
    assert any(text in str(d) for d in found) or expected == IGNORE
    early = before_loading(saved, arguments, adapter_config(arguments.adapter, "causal-lm"))
    assert all(d.verdict in (REFUSE, SAY) for d in early)
    if expected == REFUSE:
        with pytest.raises(ValueError, match=text):
            refuse_others(found, "checkpoint-2")
        assert name == "targets" or any(text in str(d) for d in early), "known before the model is loaded"
    elif expected == SAY:
        assert any(text in line for line in refuse_others(found, "checkpoint-2"))


def test_another_base_model_other_rows_another_optimizer(saved: dict[str, Any]) -> None:
    for changed, expected in (
        (record(parsed(), seed=1), REFUSE),
        (record(parsed(), hidden_size=32), REFUSE),
        (record(parsed(), rope_theta=5.0, rope_parameters={"rope_theta": 5.0, "rope_type": "default"}), REFUSE),
        (record(parsed(), rows=9), SAY),
        ({**saved, "optimizer.class": "AdamW"}, REFUSE),
        ({**saved, "optimizer.weight_decay": 0.5}, SAY),
    ):
        assert expected in {d.verdict for d in compare(saved, changed, TABLE)}
    assert compare(saved, record(parsed(), lr=0.5), TABLE) == [], "the learning rate is the flag's and the schedule's"


def test_a_base_model_that_differs_in_one_kind_of_weight() -> None:
    """As after merging a LoRA of `v_proj`; a stride through layers of nine weights each would miss it."""
    model = LlamaForCausalLM(LlamaConfig(**{**MODEL, "num_hidden_layers": 16})).requires_grad_(False)
    before = {"base.samples": sample_weights(model)}
    kinds = {re.sub(r"\d+", "", name) for name, _ in model.named_parameters()}
    assert len(kinds) == 12
    for kind in kinds:
        of_kind = [param for name, param in model.named_parameters() if re.sub(r"\d+", "", name) == kind]
        for param in of_kind:
            param.add_(0.1)
        assert [d.verdict for d in compare(before, {"base.samples": sample_weights(model)})] == [REFUSE], kind
        for param in of_kind:
            param.sub_(0.1)
    before = {"base.samples": sample_weights(model.bfloat16())}
    for steps, expected in ((1, []), (2, [REFUSE])):  # from the start, in bf16's own steps
        for param in model.parameters():
            param.view(torch.int16).add_(1)
        assert [d.verdict for d in compare(before, {"base.samples": sample_weights(model)})] == expected, steps


def other_value(draw: random.Random, value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + draw.choice([1, 2, 0.5] if isinstance(value, float) else [1, 2])
    if isinstance(value, list):
        return [*value, "another"]
    return f"{getattr(value, 'value', value)}-another"


def test_drawn_pairs_are_refused_said_or_cannot_matter(report: Any) -> None:
    """Every field of every class of flags, with a drawn other value: silent are those of the table's IGNORED alone."""
    draw = random.Random(0)
    found = {REFUSE: 0, SAY: 0, IGNORE: 0}
    for task in TASKS:
        arguments = Arguments(
            RunArguments(task=task), AdapterArguments(), ScoringArguments(), TRAINING_CLASSES[task](), demo=False
        )
        before = settings(arguments)
        for part in ("run", "scoring", "training"):
            for field in dataclasses.fields(getattr(arguments, part)):
                changed = copy.deepcopy(arguments)
                owner = getattr(changed, part)
                setattr(owner, field.name, other_value(draw, getattr(owner, field.name)))
                differences = compare(before, settings(changed), TABLE)
                told = {d.verdict for d in differences if d.name == f"flag.{field.name}"}
                expected = verdict(f"flag.{field.name}", TABLE)
                if expected == IGNORE or is_secret(field.name):
                    assert not differences
                    found[IGNORE] += 1
                else:
                    assert told == {expected}, field.name
                    found[expected] += 1
    report("Resume: drawn pairs of runs that differ in one flag", f"{found}, silent beyond the table: 0")
    assert found[REFUSE] >= 8
    assert found[SAY] > 200


def test_adapter_fields_are_refused_unless_the_table_says_otherwise(saved: dict[str, Any]) -> None:
    draw = random.Random(1)
    names = [name for name in saved if name.startswith("adapter.")]
    assert len(names) > 30
    for name in names:
        changed = {**saved, name: other_value(draw, saved[name])}
        verdicts = [d.verdict for d in compare(saved, changed, TABLE)]
        assert verdicts == ([] if verdict(name, TABLE) == IGNORE else [verdict(name, TABLE)]), name
    for name in {field.name for field in dataclasses.fields(AdapterArguments)} - SAME_MIXTURE:
        assert verdict(f"adapter.default.{name}", TABLE) in (REFUSE, SAY), name


def test_nothing_secret_is_recorded(tmp_path: Path) -> None:
    """By the names of flags, in nested values, in DeepSpeed's config, in addresses."""

    @dataclasses.dataclass
    class Training(TRAINING_CLASSES["causal-lm"]):
        some_api_key: str = "hf_another"
        output_secret: str = "hf_third"

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"comet": {"enabled": True, "api_key": "hf_fourth"}}))
    arguments = parsed("--dataset_name", "https://me:hf_fifth@host/rows.jsonl")
    arguments.training = Training(
        hub_token="hf_secret", deepspeed=str(config), model_init_kwargs={"token": "hf_sixth", "attn": "eager"}
    )
    found = record(arguments, name_or_path="https://me:hf_seventh@host/model")
    assert "hf_" not in json.dumps(found)
    assert found["deepspeed.comet.enabled"] is True
    assert found["flag.model_init_kwargs"]["attn"] == "eager"


def test_ignored_flags_exist_or_are_patterns() -> None:
    known = {
        f.name for c in (RunArguments, ScoringArguments, *TRAINING_CLASSES.values()) for f in dataclasses.fields(c)
    }
    for task in TASKS:
        known |= {f.name for f in dataclasses.fields(TRAINING_CLASSES[task])}
    unknown = [name for name in IGNORED if "*" not in name and name not in known]
    assert unknown == [], f"not flags of this transformers: {unknown}"


def test_data_are_recorded_by_number_and_content() -> None:
    rows = [{"input_ids": list(range(i, i + 9))} for i in range(100)]
    whole = data_record(Dataset.from_list(rows))
    assert whole["data.rows"] == 100
    assert data_record(Dataset.from_list([*rows[:50], {"input_ids": [0]}, *rows[51:]])) != whole
    assert data_record(Dataset.from_list(rows[::-1])) != whole
    assert data_record(Dataset.from_list(rows).shuffle(seed=1)) != whole
    stream = data_record(Dataset.from_list(rows).to_iterable_dataset())
    assert stream["data.rows"] == "streamed"
    assert stream != data_record(Dataset.from_list(rows[1:]).to_iterable_dataset())
