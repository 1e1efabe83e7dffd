"""No token, key, secret or password in anything that is written, logged or uploaded."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_moelora import MoELoRAConfig, redaction
from ds_moelora.monitoring.run_info import configuration
from ds_moelora.redaction import REDACTED, is_secret, redact, redact_text, redact_words
from launch.checks import errors
from launch.checks.arguments import command_line, parse_arguments
from launch.checks.deepspeed_config import read_deepspeed_config
from launch.checks.flags import TRAINING_CLASSES, AdapterArguments, RunArguments, ScoringArguments
from launch.cluster.multinode import exported

SECRETS = ["hub_token", "HF_TOKEN", "WANDB_API_KEY", "token", "key", "apiKey", "api_key", "AWS_SECRET_ACCESS_KEY",
           "AWS_ACCESS_KEY_ID", "password", "DB_PASSWORD", "PGPASSWORD", "secret", "client_secret", "GITHUB_TOKEN_2",
           "HFTOKEN", "authtoken", "hub-token", "push_to_hub_token", "use_auth_token", "SECRET_KEY_BASE", "API_KEYS",
           "HUGGING_FACE_HUB_TOKEN", "hf_tokens", "OPENAI_APIKEY", "SSH_PRIVATE_KEY", "hub_private_key",
           "X-Auth-Token", "myPassword", "GOOGLE_APPLICATION_CREDENTIALS", "SMTP_PASS", "Authorization"]  # fmt: skip
HARMLESS = ["tokenizer", "tokenizer_name", "max_new_tokens", "num_input_tokens_seen", "pad_token", "eos_token",
            "eos_token_id", "decoder_start_token_id", "tokens", "tokens_per_second", "mean_token_accuracy",
            "num_key_value_heads", "keys_to_ignore_at_inference", "trainable_token_indices", "k_proj", "monkey",
            "TOKENIZERS_PARALLELISM", "image_token", "additional_special_tokens", "token_type_ids", "tokens_cut",
            "average_tokens_across_devices", "KeyError", "keyboard", "last_pass", "compass"]  # fmt: skip
SECRET = "Tr0ub4dor-horse"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", set())


def test_names() -> None:
    assert [name for name in SECRETS if not is_secret(name)] == []
    assert [name for name in HARMLESS if is_secret(name)] == []
    flags = (RunArguments, AdapterArguments, ScoringArguments, MoELoRAConfig, *TRAINING_CLASSES.values())
    assert {f.name for c in flags for f in fields(c) if is_secret(f.name)} == {"hub_token"}


def test_names_of_variables_that_do_not_travel() -> None:
    """launch/multinode.sh has a coarser rule of its own, since it starts without the package."""
    names = [f"HF_{name}" for name in SECRETS]
    assert exported(dict.fromkeys(names, SECRET), []) == {}


@settings(deadline=None)
@given(
    name=st.sampled_from(SECRETS),
    value=st.text("abcXYZ0189", min_size=8, max_size=20),
    depth=st.lists(st.sampled_from(["model_init_kwargs", "a", "list"]), max_size=4),
)
def test_every_place(name: str, value: str, depth: list[str]) -> None:
    nested: Any = {name: value, "pad_token": "<pad>", "steps": 3}
    for key in depth:
        nested = {key: [nested] if key == "list" else nested}
    assert value not in json.dumps(redact(nested)).replace(name, "")
    assert "<pad>" in json.dumps(redact(nested))
    for words in (
        [f"--{name}", value],
        [f"--{name}={value}"],
        ["--model_init_kwargs", json.dumps(nested)],
        [f"--model_init_kwargs={json.dumps(nested)}"],
        ["--dataset_name", f"https://user:{value}@host/rows.jsonl"],
        ["--dataset_name", f"https://host/rows.jsonl?{name}={value}&x=1"],
    ):
        said = redact_words(["train.py", *words, "--max_new_tokens", "64"])
        assert value not in said.replace(name, ""), words
        assert said.endswith("--max_new_tokens 64")


def test_values_that_are_no_secrets() -> None:
    plain = {"eos_token": "</s>", "num_input_tokens_seen": 7, "use_auth_token": True, "token": None, "lr": 1e-3}
    assert redact(plain) == plain
    assert redact({"password": 12345678}) == {"password": REDACTED}
    assert redact_text("KeyError: 'q_proj' of tokenizer=x") == "KeyError: 'q_proj' of tokenizer=x"


def test_free_text_of_others() -> None:
    """Lists and headers in their messages, and what a DeepSpeed config held."""
    for text in (
        f'{{"secrets": ["{SECRET}", "{SECRET}"]}}',
        f"-H 'Authorization: Bearer {SECRET}'",
        f"api_key={SECRET}",
    ):
        assert SECRET not in redact_text(text), text
    assert redact_text("the bearer of this") == "the bearer of this"


def test_secrets_of_the_deepspeed_config_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"comet": {"api_key": SECRET}}))
    read_deepspeed_config(str(path))
    assert SECRET not in redact_text(f"a library complains of {SECRET}")


@pytest.mark.parametrize("task", TRAINING_CLASSES)
def test_training_arguments(task: str, tmp_path: Path) -> None:
    """All fields: what an integration writes, and what a pickle holds. A copy in the process keeps everything."""
    recipe = tmp_path / "recipe.yaml"
    more = f"model_init_kwargs: {{token: {SECRET}}}\n" if task in ("causal-lm", "image-text-to-text") else ""
    recipe.write_text(f"hub_token: {SECRET}\n{more}")
    words = ["--config", str(recipe), "--task", task, "--model_name_or_path", "m", "--dataset_name", "d"]
    training = parse_arguments(words, {}).training
    assert training.hub_token == SECRET
    assert copy.deepcopy(training).hub_token == copy.copy(training).hub_token == SECRET
    assert SECRET not in json.dumps(training.to_dict(), default=str)
    assert SECRET.encode() not in pickle.dumps(training)
    assert SECRET not in redact_text(f"a library complains of {SECRET}")


def test_summary_and_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub-token", SECRET, "--seed", "1"])
    assert command_line() == f"train.py --hub-token {REDACTED} --seed 1"
    found = configuration(
        nn.Linear(1, 1), SimpleNamespace(config={"comet": {"api_key": SECRET}, "train_batch_size": 2})
    )
    assert SECRET not in json.dumps(found)
    assert found["deepspeed"]["train_batch_size"] == 2


def test_errors_and_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogRecordFactory()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", SECRET])
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", SECRET[::-1])
    try:
        errors.keep_secrets()
        logger = logging.getLogger("somebody else's")
        logger.addHandler(handler)
        logger.warning("config: %s", {"x": SECRET, "y": SECRET[::-1]})
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    said = stream.getvalue() + errors.describe(ValueError(f"{SECRET} was refused by {SECRET[::-1]}"), debug=False)
    assert REDACTED in said
    assert SECRET not in said
    assert SECRET[::-1] not in said
