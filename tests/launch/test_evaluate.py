"""launch/evaluate.py and generate.py: the same scores for any batch, as in training, and without DeepSpeed."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ds_moelora import MoELoRAConfig
from ds_moelora.cli import main as inspect
from launch import evaluate, generate
from launch.checks.errors import UserError
from launch.data.answering import prompt_tokens, write_answers
from tests.support.launch_support import (
    CHAT_TEMPLATE,
    ROOT,
    alpaca_rows,
    launch,
    question_rows,
    tiny_model,
    write_jsonl,
)

ROWS = 7
PROMPTS = ["a", "bcdefgh", "ij", "klmnopqrstuv", "w", "xyz", "0123"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), CHAT_TEMPLATE)


def save_adapter(base: Path, folder: Path, auto: Any = AutoModelForCausalLM, **changes: Any) -> Path:
    fields = {"r": 2, "num_experts": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    labels = {} if auto is AutoModelForCausalLM else {"num_labels": changes.pop("num_labels")}
    config = MoELoRAConfig(**{**fields, "task_type": "CAUSAL_LM", **changes})
    torch.manual_seed(1)
    model = get_peft_model(auto.from_pretrained(base, **labels), config)
    if config.from_svd:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "alpaca.jsonl", alpaca_rows(ROWS))


def scores_of(*argv: object) -> dict[str, float]:
    return evaluate.main([str(word) for word in argv])["metrics"]


def test_perplexity_weighs_tokens_and_not_batches(base: Path, adapter: Path, tmp_path: Path):
    """Completions of very different lengths: the mean over batches of their means would change with the batch size."""
    rows = [{"prompt": "p" * (1 + i % 3), "completion": "c" * (1 + 4 * i)} for i in range(ROWS)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = [scores_of("--adapter", adapter, "--dataset_name", data, "--batch_size", size) for size in (1, 3, ROWS)]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    nll = tokens = 0.0
    for row in rows:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll -= log_probs.gather(1, ids[0, len(prompt) :, None]).sum().item()
        tokens += ids.shape[1] - len(prompt)
    for metrics in found:
        assert metrics["tokens"] == tokens
        assert metrics["loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


@pytest.mark.parametrize("template", [False, True])
def test_answers_do_not_depend_on_the_batch(base: Path, adapter: Path, tmp_path: Path, template: bool):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts: list[Any] = [[{"role": "user", "content": p}] for p in PROMPTS] if template else PROMPTS
    expected = []
    for prompt in prompts:  # one by one, without any padding
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) if template else prompt
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not template)["input_ids"]
        with torch.no_grad():
            written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    model.train()
    for size in (1, 3, ROWS):
        worded = [prompt_tokens(prompt, tokenizer) for prompt in prompts]
        assert write_answers(model, tokenizer, worded, size, max_new_tokens=6) == expected
    assert model.training
    if template:
        return
    # Three of the references are what the model writes.
    rows = [
        {"prompt": p, "completion": e if i < 3 else "!"} for i, (p, e) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "predictions.jsonl"
    flags = ("--adapter", adapter, "--dataset_name", data, "--score", "answers", "--max_new_tokens", 6)
    for size in (2, 5):
        metrics = scores_of(*flags, "--batch_size", size, "--predictions", out)
        assert metrics["exact_match"] == pytest.approx(3 / ROWS)
        assert metrics["answered"] == 1.0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["written"] for line in lines] == expected
        assert [line["right"] for line in lines] == [True] * 3 + [False] * 4


def check_what_is_remembered(output: Path, data: Path, loss: float, capsys: pytest.CaptureFixture[str]) -> None:
    """adapter_config.json has it, another template is used and said, `generate` words prompts as training did."""
    record = json.loads((output / "adapter_config.json").read_text())["trained_with"]
    expected = {"prompt_template": "chat", "max_length": 256, "precision": "fp32", "data": [str(data)], "steps": 2}
    expected |= {"optimizer": "GateRiemannianAdamW", "learning_rate": 1e-2, "rows_per_step": 4, "zero_stage": 2}
    assert {name: record[name] for name in expected} == expected
    assert record["optimizer_settings"]["damping"] == 1e-6
    assert record["optimizer_settings"]["gate_scaling"] == "sqrt"
    assert inspect(["inspect", str(output)]) == 0
    shown = capsys.readouterr().out
    assert 'prompt_template "chat"' in shown
    assert "damping 1e-06" in shown
    other = scores_of("--adapter", output, "--dataset_name", data, "--prompt_template", "alpaca", "--max_length", 200)
    assert other["loss"] != pytest.approx(loss, rel=1e-3)
    said = capsys.readouterr().err
    assert "--prompt_template alpaca: this adapter was trained with chat" in said
    assert "--max_length 200: this adapter was trained with 256." in said
    flags = ["--adapter", str(output), "--prompt", "hello", "--max_new_tokens", "3"]
    assert generate.main(flags) == generate.main([*flags, "--prompt_template", "chat"])
    assert "prompt_template" not in capsys.readouterr().err
    generate.main([*flags, "--prompt_template", "none"])
    assert "--prompt_template none: this adapter was trained with chat" in capsys.readouterr().err


@pytest.mark.dist
def test_training_reports_the_same_numbers(base: Path, alpaca: Path, tmp_path: Path, capsys):
    """Two ranks, seven rows: the last batch is filled up with a row that must not count twice."""
    output = tmp_path / "out"
    scoring = ["--answer_pattern", "(.)", "--max_new_tokens", "3"]
    finished = launch(
        ["--model_name_or_path", str(base), "--dataset_name", str(alpaca), "--eval_dataset_name", str(alpaca),
         "--deepspeed", "configs/zero2.json", "--output_dir", str(output), "--lora_r", "2", "--num_experts", "2",
         "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2", "--learning_rate", "1e-2",
         "--max_steps", "2", "--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "1",
         "--max_length", "256", "--prompt_template", "chat", *scoring]
    )  # fmt: skip
    assert finished.code == 0, finished.output[-4000:]
    during = json.loads((output / "train_summary.json").read_text())["eval"]
    after = scores_of("--adapter", output, "--dataset_name", alpaca, *scoring)
    assert {"loss", "perplexity", "exact_match", "answered", "mean_token_accuracy", "tokens"} == after.keys()
    for name, value in after.items():
        assert during[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert json.loads((output / "evaluation-alpaca.json").read_text())["metrics"] == after
    evaluations = re.findall(r"'eval_loss': .*'step': '(\d)/2'", finished.output)
    assert evaluations == ["1", "2"], "the last one once, when the adapter is saved"
    check_what_is_remembered(output, alpaca, after["loss"], capsys)
    card = (output / "README.md").read_text()
    for part in (
        "## Evaluation",
        "| exact match |",
        "| optimizer | GateRiemannianAdamW |",
        "| its settings | betas [0.9, 0.999], damping 1e-06",
        "| prompt template | chat |",
        "| maximum length | 256 |",
        "num_experts",
        "model-index",
    ):
        assert part in card
    assert str(base) not in card.split("---")[1], "the hub refuses a base model that is no repository"


@pytest.mark.parametrize("start", [True, "goat"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_starts_and_dtypes(base: Path, tmp_path: Path, start: Any, dtype: str):
    data = write_jsonl(tmp_path / "rows.jsonl", question_rows(ROWS))
    saved = save_adapter(base, tmp_path / "cls", AutoModelForSequenceClassification, task_type="SEQ_CLS", num_labels=2,
                         init_lora_weights=start)  # fmt: skip
    flags = ("--adapter", saved, "--dataset_name", data, "--dtype", dtype, "--classes", "no", "yes")
    first, second = (scores_of(*flags, "--batch_size", size) for size in (2, ROWS))
    assert first.keys() == {"loss", "accuracy", "f1", "f1_macro", "matthews", "majority_class_accuracy"}
    assert first["majority_class_accuracy"] == pytest.approx(4 / 7)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5 if dtype == "float32" else 2e-2)
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), saved)
    model.config.pad_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = 0
    for row in question_rows(ROWS):
        with torch.no_grad():
            logits = model(**tokenizer(row["question"], return_tensors="pt")).logits
        right += ("no", "yes")[logits.argmax().item()] == row["label"]
    if dtype == "float32":
        assert first["accuracy"] == pytest.approx(right / ROWS)


def test_numbers_as_labels(base: Path, tmp_path: Path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {i}", "label": i / 2} for i in range(ROWS)])
    saved = save_adapter(base, tmp_path / "reg", AutoModelForSequenceClassification, task_type="SEQ_CLS", num_labels=1)
    (saved / "train_summary.json").write_text(json.dumps({"classes": [], "regression": True}))
    metrics = scores_of("--adapter", saved, "--dataset_name", data)
    assert metrics.keys() == {"loss", "pearson", "spearman", "mse"}
    assert metrics["loss"] == pytest.approx(metrics["mse"], rel=1e-5)


def test_recipe_for_training(base: Path, adapter: Path, alpaca: Path, tmp_path: Path):
    """Its evaluation data and output_dir are taken; what concerns training alone is passed over, typing errors not."""
    recipe = tmp_path / "recipe.yaml"
    text = f"dataset_name: nowhere\neval_dataset_name: {alpaca}\noutput_dir: {adapter}\nr: 4\nmax_train_samples: 9\n"
    recipe.write_text(text)
    results = evaluate.main(["--config", str(recipe), "--output", str(tmp_path / "deep/er/results.json")])
    assert results["dataset"] == str(alpaca)
    assert json.loads((tmp_path / "deep/er/results.json").read_text()) == results
    without = scores_of("--adapter", "none", "--model_name_or_path", base, "--dataset_name", alpaca)
    assert without["loss"] != pytest.approx(results["metrics"]["loss"], rel=1e-5)
    recipe.write_text(text + "lerning_rate: 1\n")
    with pytest.raises(UserError, match="lerning_rate"):
        evaluate.main(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "x.jsonl"], "--adapter is missing"),
        (["--adapter", "ADAPTER"], "--dataset_name is missing"),
        (["--adapter", "./nowhere", "--dataset_name", "x.jsonl"], "no such folder"),
        (["--adapter", "ADAPTER", "--dataset_name", "./x.jsonl"], "no such file"),
        (["--adapter", "ADAPTER", "--dataset_name", "x.jsonl", "--batch_size", "0"], "at least 1"),
        (["--adapter", "ADAPTER", "--dataset_name", "x.jsonl", "--dtype", "int8"], "invalid choice: 'int8' .*bfloat16"),
        (["--adapter", "ADAPTER", "--dataset_name", "x", "--answer_pattern", "("], "no regular expression"),
        (["--adapter", "ADAPTER", "--dataset_name", "x", "--answer_pattern", "a", "--score", "loss"], "no effect"),
        (["--adapter", "ADAPTER", "--dataset_name", "x", "--predictions", "p"], "--predictions needs answers"),
        (["--adapter", "ADAPTER", "--dataset_name", "x", "--task", "sequence-classification"], "pass --classes"),
        (["--adapter", "none", "--dataset_name", "x"], "pass --model_name_or_path"),
        (["--adaptr", "x"], "unknown argument 'adaptr'. Did you mean --adapter"),
    ],
)
def test_errors_name_the_remedy(adapter: Path, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        evaluate.main([str(adapter) if word == "ADAPTER" else word for word in flags])


def test_generate(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    common = ["--adapter", str(adapter), "--max_new_tokens", "4"]
    one = generate.main([*common, "--prompt", "abc", "xyz"])
    assert "> abc\n" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("abc\n\nxyz\n")
    assert (
        generate.main([*common, "--prompt_file", str(tmp_path / "prompts.txt"), "--batch_size", "1", "--json"]) == one
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["answer"]) for line in lines] == list(zip(("abc", "xyz"), one, strict=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\nxyz\n"))
    assert generate.main([*common, "--json"]) == []
    assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == one
    sampled = [generate.main([*common, "--prompt", "abc", "--temperature", "5", "--seed", s]) for s in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    generate.main([*common, "--prompt", "abc", "--prompt_template", "chat", "--system", "be brief"])
    for flags in (["--top_p", "0.5"], ["--system", "s"], ["--max_new_tokens", "0"], ["--prompt_file", "nowhere"]):
        with pytest.raises(UserError, match=flags[0]):
            generate.main([*common, *flags])


WITHOUT_DEEPSPEED = """
import importlib.util as util, json, sys
sys.modules["deepspeed"] = None
find = util.find_spec
util.find_spec = lambda name, *a: None if name == "deepspeed" else find(name, *a)
from launch import evaluate, generate
adapter, data = sys.argv[1:]
evaluate.main(["--adapter", adapter, "--dataset_name", data, "--answer_pattern", "(.)", "--max_new_tokens", "2"])
generate.main(["--adapter", adapter, "--prompt", "abc", "--max_new_tokens", "2"])
print("done", [name for name in sys.modules if name.startswith("deepspeed.")])
"""


def test_without_deepspeed(adapter: Path, alpaca: Path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_DEEPSPEED, str(adapter), str(alpaca)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip().endswith("done []"), done.stderr[-3000:]
    assert "exact match" in done.stdout
