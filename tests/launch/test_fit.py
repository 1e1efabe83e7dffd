"""Model, tokenizer, data and flags that do not fit each other are found before weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from ds_moelora import MoELoRAConfig
from launch import train
from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.bounds import check_bounds
from launch.checks.errors import UserError
from launch.demo import base as demo_base
from launch.demo import defaults as demo
from launch.training import modeling, trainers
from launch.training.fit import position_limit
from launch.training.prepared import prepare
from launch.training.processors import load_processor
from tests.support.launch_support import CHAT_TEMPLATE, alpaca_rows, chat_tokenizer, tiny_model, write_jsonl

TOKENS = len(chat_tokenizer())
SIZES = {"vocab_size": TOKENS, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), CHAT_TEMPLATE)


@pytest.fixture
def parse(llama: Path, tmp_path: Path) -> Any:
    def parsed(*flags: str, model: Path = llama, rows: list[dict[str, Any]] | None = None) -> Arguments:
        data = write_jsonl(tmp_path / "rows.jsonl", rows or alpaca_rows(6))
        return parse_arguments(
            ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"),
             "--optim", "adamw_torch", "--report_to", "none", "--r", "2", "--num_experts", "2", "--top_k", "1", *flags],
            {},
        )  # fmt: skip

    return parsed


def on_disk(config: Any, folder: Path, architecture: str) -> Path:
    """A model's config and a tokenizer, without weights."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "limit"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=48), 48),
        (OPTForCausalLM, OPTConfig(vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
                                   max_position_embeddings=48, word_embed_proj_dim=8), 48),
        (RobertaModel, RobertaConfig(**SIZES, intermediate_size=8, max_position_embeddings=48, pad_token_id=1), 46),
        (BertModel, BertConfig(**SIZES, intermediate_size=8, max_position_embeddings=48), 48),
        (GPTJForCausalLM, GPTJConfig(vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=48, rotary_dim=4), 48),
        (LlamaForCausalLM, LlamaConfig(**SIZES, intermediate_size=8, max_position_embeddings=48), None),
    ],
)  # fmt: skip
def test_the_limit_is_the_longest_row_that_the_model_takes(kind: Any, config: Any, limit: int | None) -> None:
    model = kind(config).eval()
    assert position_limit(model) == limit
    ids = torch.full((1, 49 if limit is None else limit), 5)
    with torch.no_grad():
        model(ids)
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, limit + 1), 5))


def gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=TOKENS, n_embd=8, n_layer=1, n_head=2, n_positions=48, eos_token_id=1)
    return on_disk(config, folder, "GPT2LMHeadModel")


def test_rows_longer_than_the_models_positions(tmp_path: Path, parse: Any, capsys: Any) -> None:
    folder = gpt2(tmp_path / "model")
    with pytest.raises(UserError, match="--max_length 64: this model has 48 positions; use at most 48"):
        prepare(parse("--max_length", "64", model=folder))
    arguments = parse(model=folder)
    prepare(arguments)
    assert arguments.training.max_length == 48
    assert "--max_length is 48, not 1024: this model has no more positions." in capsys.readouterr().out
    prepare(parse("--max_length", "4096"))  # RoPE
    assert "this model was made for 2048 positions" in capsys.readouterr().out


def test_tokens_that_the_model_has_no_row_for(tmp_path: Path, parse: Any) -> None:
    sizes = {**SIZES, "intermediate_size": 8, "vocab_size": 60}
    folder = on_disk(LlamaConfig(**sizes), tmp_path / "model", "LlamaForCausalLM")
    with pytest.raises(UserError, match=r"row 0 of the data: the tokenizer makes the token \d+ of it"):
        prepare(parse(model=folder))
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"pad_token '<new>' has the number {TOKENS}, and the model has rows for 60"):
        prepare(parse(model=folder))
    with pytest.raises(UserError, match="--eos_token '<nope>' is no token of"):
        prepare(parse("--eos_token", "<nope>"))


def test_a_template_with_tokens_of_its_own_is_refused(
    tmp_path: Path, parse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or "nowhere" is asked for, many times
    other = chat_tokenizer()
    other.chat_template = "<|im_start|>" + CHAT_TEMPLATE
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|unused|>"]})
    other.save_pretrained(tmp_path / "other")
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(UserError, match=r"its template writes <\|im_start\|>, which this model's tokenizer lacks"):
        prepare(parse("--chat_template_path", str(tmp_path / "other"), rows=rows))
    other.chat_template = "!" + CHAT_TEMPLATE
    other.save_pretrained(tmp_path / "other")
    arguments = parse("--chat_template_path", str(tmp_path / "other"), rows=rows)
    made, _ = prepare(arguments)
    assert made.processor.chat_template == other.chat_template
    assert len(made.processor) == TOKENS
    assert arguments.training.chat_template_path is None  # TRL would resize the model
    (tmp_path / "t.jinja").write_text("?" + CHAT_TEMPLATE)
    made, _ = prepare(parse("--chat_template_path", str(tmp_path / "t.jinja"), rows=rows))
    assert made.processor.apply_chat_template(rows[0]["messages"], tokenize=False).startswith("?<user>q")
    with pytest.raises(UserError, match="--chat_template_path nowhere is neither"):
        prepare(parse("--chat_template_path", "nowhere", rows=rows))


def test_a_head_for_other_classes_is_replaced(tmp_path: Path, parse: Any, capsys: Any) -> None:
    config = BertConfig(**SIZES, intermediate_size=8, num_labels=3, max_position_embeddings=64)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(6)]
    flags = "--task", "sequence-classification", "--target_modules", "query", "--max_length", "32"
    arguments = parse(*flags, model=tmp_path / "model", rows=rows)
    made, _ = prepare(arguments)
    assert "head has 3 outputs, and the data needs 2: a new head is trained" in capsys.readouterr().out
    arguments.training.start()
    model = modeling.load_model(arguments, made.config, made.model_options, made.processor)
    assert model.get_base_model().classifier.modules_to_save["default"].weight.shape == (2, 8)
    assert trainers.build_trainer(arguments, model, made.processor, made.train, None, []).truncation["train"].rows == 6


def test_heads_are_trained_whole_and_not_adapted(tmp_path: Path, parse: Any) -> None:
    """DistilBERT's head has two layers, of which PEFT adapts one under all-linear, and cannot save it whole then."""
    config = DistilBertConfig(vocab_size=TOKENS, dim=8, hidden_dim=8, n_layers=1, n_heads=2, max_position_embeddings=64)
    config.problem_type = "multi_label_classification"
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(6)]
    arguments = parse("--task", "sequence-classification", "--max_length", "32", model=tmp_path / "model", rows=rows)
    made, _ = prepare(arguments)
    arguments.training.start()
    model = modeling.load_model(arguments, made.config, made.model_options, made.processor)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    heads = {name for name in trained if "classifier" in name}
    assert heads
    assert not any("lora" in name for name in heads)
    assert {"q_lin", "lin2"} <= {part for name in trained if "lora_B" in name for part in name.split(".")}
    trainer = trainers.build_trainer(arguments, model, made.processor, made.train, None, [])
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.isfinite(trainer.compute_loss(model, batch))  # one class each, whatever the base was for


def test_a_model_that_sees_what_comes_after_is_no_causal_lm(tmp_path: Path, parse: Any) -> None:
    folder = on_disk(BertConfig(**SIZES, intermediate_size=8), tmp_path / "model", "BertForMaskedLM")
    with pytest.raises(UserError, match="BertForMaskedLM sees what comes after a token"):
        prepare(parse(model=folder))


def test_a_model_of_pictures_and_text_is_no_causal_lm(tmp_path: Path, parse: Any) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=TOKENS, **small).to_dict(), vision_config=small)
    with pytest.raises(UserError, match=r"--model_name_or_path .*: "):
        prepare(parse(model=on_disk(config, tmp_path / "model", "LlavaForConditionalGeneration")))


def test_targets_are_looked_for_before_the_demos_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "base_model", lambda: pytest.fail("built"))
    monkeypatch.setattr(demo_base, "_pretrain", lambda _: pytest.fail("built"))
    with pytest.raises(UserError, match=r"--target_modules q_porj: .* 'k_proj', .*'q_proj'"):
        train.main(["--deepspeed", "configs/zero2.json", "--target_modules", "q_porj", "--output_dir", str(tmp_path)])


def test_what_loading_is_told_reaches_the_model(parse: Any) -> None:
    flags = [
        "--model_init_kwargs",
        '{"attention_dropout": 0.25, "dtype": "bfloat16"}',
        "--attn_implementation",
        "eager",
    ]
    arguments = parse(*flags)
    made, _ = prepare(arguments)
    arguments.training.start()
    model = modeling.load_model(arguments, made.config, made.model_options, made.processor)
    assert model.config._attn_implementation == "eager"
    assert model.config.attention_dropout == 0.25
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    for given, message in (
        ('{"attention_drop": 1}', "attention_drop is neither in this model's config nor for loading it"),
        ('{"revision": "x"}', "revision is set by --revision"),
        ("[1]", "is no JSON object"),
        ("{", "is not JSON"),
        ('{"attn_implementation": "sdpa"}', "--attn_implementation eager and --model_init_kwargs disagree"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(parse(*flags[2:], "--model_init_kwargs", given))
    with pytest.raises(UserError, match=r"--model_name_or_path .*no_such_kernel"):
        prepare(parse("--attn_implementation", "no_such_kernel"))


def test_json_in_flags_is_read_at_once(parse: Any) -> None:
    with pytest.raises(UserError, match=r"--lr_scheduler_kwargs \{'a': 1\} is not JSON"):
        check_bounds(parse("--lr_scheduler_kwargs", "{'a': 1}"))


@pytest.fixture(scope="module")
def earlier(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an earlier run."""
    folder = tmp_path_factory.mktemp("earlier")
    config = MoELoRAConfig(r=3, num_experts=4, top_k=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.fill_(0.5)
    model.save_pretrained(folder)
    return folder


def test_training_goes_on_with_an_adapter(earlier: Path, llama: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(6))
    flags = ["--model_name_or_path", str(earlier), "--dataset_name", str(data), "--optim", "adamw_torch",
             "--report_to", "none", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    arguments = parse_arguments([*flags, "--router_jitter", "0.01"], {})
    made, _ = prepare(arguments)
    assert f"goes on with the adapter in {earlier}, on its base {llama}" in capsys.readouterr().out
    assert (made.config.r, made.config.num_experts, made.config.router_jitter) == (3, 4, 0.01)
    arguments.training.start()
    model = modeling.load_model(arguments, made.config, made.model_options, made.processor)
    weights = [param for name, param in model.named_parameters() if "lora_B" in name]
    assert all(param.requires_grad and (param == 0.5).all() for param in weights)
    assert len(weights) == len([n for n in load_file(earlier / "adapter_model.safetensors") if "lora_B" in n])
    with pytest.raises(UserError, match="is an adapter with r 3, and --r 4 would make another one"):
        prepare(parse_arguments([*flags, "--r", "4"], {}))


def test_adapters_that_cannot_be_trained_further(earlier: Path, tmp_path: Path, parse: Any) -> None:
    config = json.loads((earlier / "adapter_config.json").read_text())
    folder = tmp_path / "adapter"
    folder.mkdir()
    for changes, message in (
        ({"base_model_name_or_path": None}, "does not name its base model"),
        ({"peft_type": "LORA"}, "of another kind"),
        ({"peft_type": 3}, "cannot be read"),
    ):
        kept = {"peft_type": "LORA"} if changes.get("peft_type") == "LORA" else {**config, **changes}
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        with pytest.raises(UserError, match=f"--model_name_or_path {folder} is an adapter .*{message}"):
            prepare(parse(model=folder))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_weights_that_were_cut_are_one_message(llama: Path, tmp_path: Path, parse: Any, content: bytes | None) -> None:
    folder = tiny_model(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10] if content is None else content)
    arguments = parse(model=folder)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        prepare(arguments)


def test_a_damaged_demo_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_base, "STEPS", 1)
    folder = demo_base.base_model()
    assert demo_base.is_whole(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        assert not demo_base.is_whole(folder), name
        (folder / name).write_bytes(kept[:100])
        assert not demo_base.is_whole(folder), name
        (folder / name).write_bytes(kept)
    (folder / "model.safetensors").write_bytes(kept[:100])
    assert demo_base.base_model() == folder
    assert demo_base.is_whole(folder)


def test_evaluation_rows_are_never_dropped(parse: Any, llama: Path) -> None:
    arguments = parse("--dataloader_drop_last", "true", "--per_device_eval_batch_size", "4")
    made, _ = prepare(arguments)
    arguments.training.start()
    model = modeling.load_model(arguments, made.config, made.model_options, made.processor)
    one = made.train.select([0])
    trainer = trainers.build_trainer(arguments, model, made.processor, made.train, one, [])
    assert trainer.evaluate()["eval_tokens"] == len("it is 0") + 1
    assert trainer.get_train_dataloader().dataset.num_rows == 6
    assert trainer.args.dataloader_drop_last
    arguments.training.max_length = 4
    short = made.train.map(lambda _: {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match="no evaluation row has an answer within --max_length 4"):
        trainers.build_trainer(arguments, model, made.processor, short, one, [])


def test_a_processor_that_cannot_be_read(tmp_path: Path) -> None:
    chat_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer"):
        load_processor(str(tmp_path), "causal-lm", False)
