"""Every flag and every column is used, refused, or named in one line as not used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from datasets import Dataset

from launch.checks.arguments import parse_arguments
from launch.checks.effects import NEEDS, REFUSED, UNUSED, check_effects
from launch.checks.errors import UserError
from launch.checks.flags import TRAINING_CLASSES, AdapterArguments, RunArguments, ScoringArguments
from launch.data.causal import causal_rows
from launch.data.sources import load_data
from tests.support.launch_support import CHAT_TEMPLATE, chat_tokenizer, write_jsonl

# Read by the launcher, TRL, transformers or accelerate, whatever their value is. `launch.checks.bounds` bounds some.
_USED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm
train_sampling_strategy neftune_noise_alpha loss_type

bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs activation_offloading torch_compile torch_compile_backend torch_compile_mode
torch_empty_cache_steps use_cpu full_determinism

logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
include_num_input_tokens_seen disable_tqdm report_to run_name skip_memory_metrics debug

eval_strategy eval_on_start eval_accumulation_steps

save_only_model save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
metric_for_best_model greater_is_better resume_from_checkpoint ignore_data_skip push_to_hub
restore_callback_states_from_checkpoint

seed data_seed dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_in_order max_length
truncation_mode shuffle_dataset packing padding_free pad_to_multiple_of eval_packing completion_only_loss
assistant_only_loss dataset_num_proc chat_template_path eos_token pad_token

accelerator_config ddp_timeout deepspeed local_rank model_init_kwargs trust_remote_code
"""
USED = frozenset(_USED.split())

# The launcher's own flags. Which of them a task, a layout or another flag makes idle is refused by
# `launch.checks.effects` and the readers of the data.
_OWN = """
task model_name_or_path revision attn_implementation dataset_name dataset_config dataset_split max_eval_samples
prompt_template instruction_column input_column output_column prompt_column completion_column messages_column
prompt_format completion_format text_column text_pair_column text_pattern image_column label_column show_traceback
dataset_weights dataset_stopping streaming eval_dataset_name eval_dataset_split eval_fraction max_train_samples
load_in_4bit target_parameters regression overwrite_output_dir lost_rank_seconds stop_after_nan_steps status_file
verbose init_from_lora score answer_pattern answer_ignore max_new_tokens
"""
OWN = frozenset(_OWN.split())

NAMED = ["--model_name_or_path", "m", "--dataset_name", "d"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("task", TRAINING_CLASSES)
def test_every_training_argument_stands_in_one_table(task: str) -> None:
    """A field of a newer TRL or transformers fails here, so that somebody decides what becomes of it."""
    tables = (USED, REFUSED.keys(), UNUSED.keys(), NEEDS.keys())
    names = {item.name for item in fields(TRAINING_CLASSES[task]) if item.init}
    undecided = {name for name in names if sum(name in table for table in tables) != 1}
    assert not undecided


def test_every_flag_of_the_launcher_is_accounted_for() -> None:
    names = {item.name for kind in (RunArguments, ScoringArguments) for item in fields(kind) if item.init}
    assert names == OWN


def test_no_table_names_a_flag_that_nobody_has() -> None:
    """A field that a newer version has dropped leaves its row behind."""
    names = {item.name for kind in (*TRAINING_CLASSES.values(), AdapterArguments) for item in fields(kind)}
    assert not {*USED, *REFUSED, *UNUSED, *NEEDS} - names


OTHER_VALUES: dict[str, Any] = {bool: "true", int: "7", float: "0.5", str: "x"}


def value_for(name: str) -> list[str]:
    """Some value that is not the default."""
    special = {
        "eval_do_concat_batches": "false",
        "average_tokens_across_devices": "false",
        "remove_unused_columns": "false",
        "dataset_kwargs": '{"skip_prepare_dataset": true}',
        "liger_kernel_config": '{"rope": true}',
        "parallelism_config": "x",
        "eval_steps": "3",
        "per_device_eval_batch_size": "3",
        "dataloader_prefetch_factor": "3",
        "ddp_bucket_cap_mb": "3",
        "eval_delay": "3",
        "hub_strategy": "end",
        "ddp_backend": "gloo",
        "dataloader_multiprocessing_context": "fork",
        "packing_strategy": "bfd_split",
        "dataset_text_field": "words",
        "length_column_name": "words",
        "ep_dispatch": "tokens",
    }
    flags = (*fields(TRAINING_CLASSES["causal-lm"]), *fields(AdapterArguments))
    default = {item.name: item.default for item in flags}[name]
    return [special.get(name, OTHER_VALUES.get(type(default), "true"))]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_do_harm_is_refused(name: str) -> None:
    try:
        arguments = parse_arguments([*NAMED, f"--{name}", *value_for(name)], {})
    except UserError:
        return  # no value of it can be written on a command line
    with pytest.raises(UserError, match=f"--{name} .* is not supported: "):
        check_effects(arguments)


@pytest.mark.parametrize("name", sorted({*UNUSED, *NEEDS}))
def test_what_does_nothing_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "sequence-classification"] if name == "average_tokens_across_devices" else []
    arguments = parse_arguments([*NAMED, *task, "--deepspeed", "x", f"--{name}", *value_for(name)], {})
    check_effects(arguments)
    said = capsys.readouterr().out
    assert said.startswith(f"--{name}")
    assert len(said.splitlines()) == 1
    assert name != "hub_token" or "true" not in said


def test_what_has_an_effect_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--push_to_hub", "true", "--hub_model_id", "me/it", "--eval_fraction", "0.5", "--eval_steps", "3"]
    check_effects(parse_arguments([*NAMED, *flags, "--dataloader_num_workers", "2"], {}))
    assert capsys.readouterr().out == ""


def test_flags_of_the_launcher_that_do_nothing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--eta", "2", "--rho", "3", "--svd_cache_dir", "x", "--ep_dispatch", "tokens"]
    check_effects(parse_arguments([*NAMED, *flags, "--scaling", "goat", "--init_lora_weights", "goat"], {}))
    assert capsys.readouterr().out == "--ep_dispatch tokens is not used: it needs --ep_size above 1.\n"
    check_effects(parse_arguments([*NAMED, *flags, "--ep_size", "2"], {}))
    said = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert said == {"--eta", "--rho", "--svd_cache_dir"}
    flags = ["--model_name_or_path", str(tmp_path), "--dataset_name", "d"]
    check_effects(parse_arguments([*flags, "--revision", "v2", "--max_new_tokens", "3"], {}))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["--revision v2 is not used", "--max_new_tokens 3 is not used"]
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "a"}])
    flags[-1] = str(data)
    load_data(parse_arguments([*flags, "--prompt_template", "plain"], {}), chat_tokenizer())
    assert capsys.readouterr().out == "--prompt_template plain is not used: no data set has instruction rows.\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_dataset_split", "test"], "--eval_dataset_split test has no effect without --eval_dataset_name"),
        (["--max_eval_samples", "3"], "--max_eval_samples 3 has no effect"),
    ],
)
def test_flags_that_need_another_one(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_effects(parse_arguments([*NAMED, *flags], {}))


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOLED = CHAT_TEMPLATE + "{% if tools %}{{ tools | length }}{% endif %}"
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def converted(row: dict[str, Any], template: str = CHAT_TEMPLATE, **run: Any) -> list[dict[str, Any]]:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return causal_rows(Dataset.from_list([row]), RunArguments(**run), "--dataset_name d", tokenizer).to_list()


# Column, row, flags, and what is made: (prompt's contents, number of rows), or the line that names what is left out.
COLUMNS: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
    ("system", {"messages": [USER, ANSWER], "system": "s"}, {}, (["s", "q"], 1)),
    ("system", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, {},
     (["s", "q"], 1)),
    ("system", {"instruction": "q", "output": "a", "system": "s"}, {"prompt_template": "chat"}, (["s", "q"], 1)),
    ("system", {"instruction": "q", "output": "a", "system": "s"}, {}, "columns that are not read: system"),
    ("history", {"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, {"prompt_template": "chat"},
     (["q0"], 2)),
    ("history", {"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, {}, "not read: history"),
    ("tools", {"messages": [USER, ANSWER], "tools": '[{"name": "w"}]'}, {}, "columns that are not read: tools"),
    ("id", {"prompt": "q", "completion": "a", "id": 3, "source": "x"}, {}, "not read: id, source"),
    ("weight", {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, {}, (["q", "a", "q"], 1)),
    ("weight", {"prompt": [USER, {**ANSWER, "weight": 0}, USER], "completion": [ANSWER]}, {}, (["q", "a", "q"], 1)),
    ("weight", {"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]}, {}, "not trained: weight"),
    ("name", {"messages": [{**USER, "name": "joe"}, ANSWER]}, {}, "the chat template does not use: name"),
    ("reasoning", {"messages": [USER, {**ANSWER, "reasoning": "r"}]}, {}, "does not use: reasoning"),
    ("reasoning_content", {"messages": [USER, {**ANSWER, "reasoning_content": "r"}]}, {}, "use: reasoning_content"),
    ("observation", {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "o"},
                                       {"from": "gpt", "value": "a"}]}, {}, (["q", "o"], 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "row", "run", "expected"), COLUMNS, ids=[f"{i} {c[0]}" for i, c in enumerate(COLUMNS)]
)
def test_every_column_is_read_or_named(
    column: str, row: dict[str, Any], run: dict[str, Any], expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = converted(row, **run)
    said = capsys.readouterr().out
    if isinstance(expected, str):
        assert expected in said
    else:
        assert ([message["content"] for message in made[0]["prompt"]], len(made)) == expected
        assert said == ""


def test_what_a_text_layout_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match=r"row 0 .*all of a completion is trained, and a message in it has weight 0"):
        converted({"prompt": [USER], "completion": [{**ANSWER, "weight": 0}]})
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}
    with pytest.raises(UserError, match=r"row 0 .*message 1: a part of the content is no text: {'type': 'image'"):
        converted({"messages": [picture, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]})


def test_keys_and_tools_that_the_template_words_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"messages": [USER, {**ANSWER, "reasoning_content": "r"}], "tools": [{"name": "w"}]}
    (made,) = converted(row, TOOLED + "{{ messages[0].reasoning_content }}")
    assert made["completion"] == [{**ANSWER, "reasoning_content": "r"}]
    assert made["tools"] == '[{"name": "w"}]'
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ],
)
def test_calls_of_functions_are_answers_in_every_spelling(call: dict[str, Any]) -> None:
    template = CHAT_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    )
    first = {"from": "human", "value": "q"} if "from" in call else USER
    row = {"conversations" if "from" in call else "messages": [first, call]}
    (made,) = converted(row, template)
    function = {"name": "f", "arguments": {"x": 1}}
    expected = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    assert made["completion"] == [expected]
    with pytest.raises(UserError, match=r"row 0 .* message 2: the answer is a tool call, which this model's chat"):
        converted(row)


def test_all_of_a_conversation_is_trained_once_if_completion_only_loss_is_off() -> None:
    rows = Dataset.from_list([{"messages": [USER, ANSWER, USER, ANSWER]}])
    made = causal_rows(rows, RunArguments(), "data", chat_tokenizer(), whole=True)
    assert made.to_list() == [{"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}]


def test_a_local_data_set_has_no_configuration(tmp_path: Path) -> None:
    from launch.data.rows import load_rows

    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="--dataset_config main has no effect"):
        load_rows(str(tmp_path / "x.jsonl"), "--dataset_name", "train", config="main")
