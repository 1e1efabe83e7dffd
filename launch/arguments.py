"""Command line and recipe file of the launcher.

Flags are the fields of three dataclasses: `RunArguments` (what to train on what), `AdapterArguments` (the mixture) and
the training arguments of the task, which are TRL's `SFTConfig` (causal-lm) or transformers' `TrainingArguments`
(classification). `--config recipe.yaml` sets any of them by name; the command line wins.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from trl import SFTConfig, TrlParser

from launch.errors import UsageError, UserError

TASKS = ("causal-lm", "sequence-classification", "image-classification")
DEFAULT_OPTIM = "adamw_torch"


def _flag(default: Any, help_text: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help_text})


def _pattern(name: str) -> Any:
    """A flag that gives single layers another value; JSON on the command line, a mapping in a recipe."""
    return _flag(
        None, f"Layers whose {name} differs, as JSON, e.g. '{{\"q_proj\": 4}}'; keys may be regular expressions."
    )


@dataclass
class RunArguments:
    """Which model is trained on which data for which task."""

    task: str = field(
        default="causal-lm",
        metadata={"help": "causal-lm, sequence-classification or image-classification.", "choices": list(TASKS)},
    )
    model_name_or_path: str | None = _flag(None, "Model: a folder or a hub id. Without model and dataset: the demo.")
    revision: str = _flag("main", "Branch, tag or commit of a model from the hub.")
    dataset_name: str | None = _flag(None, "Training data: a jsonl, json, csv or parquet file, a folder, or a hub id.")
    dataset_config: str | None = _flag(None, "Configuration of a dataset from the hub.")
    dataset_split: str = _flag("train", "Split of --dataset_name to train on.")
    eval_dataset_name: str | None = _flag(None, "Evaluation data, in the same form as --dataset_name.")
    eval_dataset_split: str | None = _flag(None, "Its split. Default: the first of validation, test, train it has.")
    eval_fraction: float = _flag(0.0, "Share of the training data set aside for evaluation (instead of a dataset).")
    max_train_samples: int | None = _flag(None, "Use the first N training rows only.")
    max_eval_samples: int | None = _flag(None, "Use the first N evaluation rows only.")
    prompt_template: str = field(
        default="alpaca",
        metadata={
            "help": "How instruction/input rows become a prompt: alpaca (the Stanford wording), plain (instruction, "
            "input, one per line) or chat (the tokenizer's chat template).",
            "choices": ["alpaca", "plain", "chat"],
        },
    )
    text_column: str | None = _flag(None, "Classification: the column with the text. Default: see docs/launcher.md.")
    text_pair_column: str | None = _flag(None, "Classification: the second of two texts; needs --text_column.")
    text_pattern: str | None = _flag(
        None, "Classification: a regular expression; its first group in each text is what the model reads."
    )
    image_column: str | None = _flag(None, "Images: the column with the pictures. Default: image, img or picture.")
    label_column: str | None = _flag(None, "Classification: the column with the label. Default: label or answer.")
    overwrite_output_dir: bool = _flag(False, "Accept a non-empty output_dir; its old checkpoints are removed.")
    show_traceback: bool = _flag(False, "Show the traceback of errors that are otherwise one message.")


@dataclass
class AdapterArguments:
    """The mixture of LoRA experts; each field is the one of the same name in `ds_moelora.MoELoRAConfig`."""

    # The alias is for torchrun, which takes `--r` for one of its own flags, even behind the script's name.
    r: int = field(default=8, metadata={"help": "Rank of one expert.", "aliases": ["--lora_r"]})
    num_experts: int = _flag(8, "Experts per layer.")
    top_k: int = _flag(2, "Experts that a token uses.")
    lora_alpha: float = _flag(16.0, "Numerator of the scaling.")
    lora_dropout: float = _flag(0.0, "Dropout on the adapter's input.")
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Module names, one regular expression, or all-linear: where the mixture is put."},
    )
    scaling: str = _flag("alpha", "alpha: alpha/r. rslora: alpha/sqrt(r).")
    init_lora_weights: str = _flag("true", "true: B starts at zero; other values: see MoELoRAConfig.")
    router_aux_loss_coef: float = _flag(1e-3, "Weight of the load-balancing loss; 0 switches it off.")
    router_z_loss_coef: float = _flag(0.0, "Weight of the router z-loss; 0 switches it off.")
    router_temperature: float = _flag(1.0, "What the router's logits are divided by.")
    router_jitter: float = _flag(0.0, "eps: in training the router's input is times uniform(1 - eps, 1 + eps).")
    top_p: float | None = _flag(None, "Use the most probable experts up to this probability, at most top_k of them.")
    shared_expert: bool = _flag(False, "One more expert per layer that every token uses.")
    shared_A: bool = _flag(False, "One A for all experts of a layer (HydraLoRA).")
    rank_pattern: str | None = _pattern("r")
    alpha_pattern: str | None = _pattern("lora_alpha")
    num_experts_pattern: str | None = _pattern("num_experts")
    top_k_pattern: str | None = _pattern("top_k")
    ep_size: int = _flag(1, "Ranks that share the experts; divides num_experts and the number of ranks. ZeRO 1 or 2.")
    ep_dispatch: str = _flag("auto", "With --ep_size > 1: move weights, tokens, or auto.")
    expert_compute: str = _flag("auto", "dense, grouped (chosen experts alone) or auto.")
    modules_to_save: list[str] = field(
        default_factory=list, metadata={"help": "Modules trained and saved in full beside the adapter."}
    )


class _Deferred:
    """Training arguments that wait for the checks.

    `TrainingArguments.__post_init__` opens torch.distributed and parses the DeepSpeed config. It is put off to
    `start()`, so that everything that can be wrong is found before any rank waits for another.
    """

    def start(self) -> None:
        """Completes the arguments; opens torch.distributed."""
        if self.bf16 is None:
            # TRL's own default is bf16 everywhere; transformers refuses that on a machine without an accelerator.
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if not torch.accelerator.is_available():
            # Without it accelerate sees no backend for a CPU, and every rank would take itself for the only one.
            self.use_cpu = True
        self.optim = self.optim or DEFAULT_OPTIM
        super().__post_init__()


@dataclass
class CausalConfig(_Deferred, SFTConfig):
    """TRL's `SFTConfig` with this launcher's defaults."""

    # The adapter's coefficient, not that of a mixture inside the base model: `AdapterArguments` has the flag.
    router_aux_loss_coef: float | None = field(default=None, init=False)
    output_dir: str = _flag("outputs/run", "Folder for the adapter, checkpoints, TensorBoard logs and the summary.")
    optim: str | None = _flag(None, "Only without an optimizer block in the DeepSpeed config: a transformers name.")
    report_to: str = _flag("tensorboard", "Where metrics go: tensorboard, none, or another integration's name.")
    logging_first_step: bool = _flag(True, "Log the first step.")
    include_num_input_tokens_seen: str = _flag("non_padding", "Count tokens: no, all or non_padding.")

    def __post_init__(self) -> None:
        """Left to `start()`."""


@dataclass
class HeadConfig(_Deferred, TrainingArguments):
    """transformers' `TrainingArguments` with this launcher's defaults, for models with a classification head."""

    output_dir: str = _flag("outputs/run", "Folder for the adapter, checkpoints, TensorBoard logs and the summary.")
    optim: str | None = _flag(None, "Only without an optimizer block in the DeepSpeed config: a transformers name.")
    report_to: str = _flag("tensorboard", "Where metrics go: tensorboard, none, or another integration's name.")
    logging_first_step: bool = _flag(True, "Log the first step.")
    include_num_input_tokens_seen: str = _flag("non_padding", "Count tokens: no, all or non_padding.")
    logging_steps: float = _flag(10, "Log every so many steps.")
    bf16: bool | None = _flag(None, "bf16 training. Default: where an accelerator supports it.")
    trust_remote_code: bool = _flag(False, "Run code that a model's repository brings. Off unless you trust it.")

    def __post_init__(self) -> None:
        """Left to `start()`."""


@dataclass
class ClassificationConfig(HeadConfig):
    """For sequence-classification."""

    max_length: int = _flag(256, "Longest input in tokens; longer texts are cut.")


@dataclass
class ImageConfig(HeadConfig):
    """For image-classification."""

    remove_unused_columns: bool = field(default=False, init=False)  # pictures are processed after columns are read


@dataclass
class Arguments:
    """Everything the command line and the recipe said.

    Args:
        run: model, data and task.
        adapter: the mixture.
        training: `CausalConfig`, `ClassificationConfig` or `ImageConfig`, not started yet.
        demo: no model and no dataset was named: the embedded default runs.
    """

    run: RunArguments
    adapter: AdapterArguments
    training: CausalConfig | ClassificationConfig | ImageConfig
    demo: bool


TRAINING_CLASSES = dict(zip(TASKS, (CausalConfig, ClassificationConfig, ImageConfig), strict=True))


class _Parser(TrlParser):
    """TrlParser whose complaints are exceptions, so that they take the same way out as every other error."""

    def error(self, message: str) -> None:
        raise UsageError(message)


def parse_arguments(argv: Sequence[str], demo_defaults: dict[str, Any]) -> Arguments:
    """Reads the command line and the recipe that it names.

    Args:
        argv: arguments without the program's name.
        demo_defaults: defaults that apply when neither a model nor a dataset is named.

    Raises:
        UsageError: an unknown flag or recipe key, a value of the wrong kind, or half a choice (model without data).
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    recipe = _read_recipe(argv)
    chosen = {name: _peek(argv, recipe, name) for name in ("task", "model_name_or_path", "dataset_name")}
    task = chosen["task"] or "causal-lm"
    if task not in TASKS:
        raise UsageError(f"--task {task} is unknown; choose one of: {', '.join(TASKS)}.")
    demo = _wants_demo(task, chosen)

    training_class = TRAINING_CLASSES[task]
    parser = _Parser((RunArguments, AdapterArguments, training_class), prog="launch/train.py", allow_abbrev=False)
    known = {action.dest for action in parser._actions} - {"help"} | {"config", "env"}
    _refuse_unknown(recipe, known, "recipe key")
    if demo:
        parser.set_defaults_with_config(**demo_defaults)
    try:
        *parsed, rest = parser.parse_args_and_config(args=argv, return_remaining_strings=True)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    _refuse_unknown([word.split("=")[0].lstrip("-") for word in rest], known, "argument", rest)
    return Arguments(*parsed, demo=demo)


def non_defaults(arguments: object) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults."""
    changed = {}
    for item in fields(arguments):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if getattr(arguments, item.name) != default:
            changed[item.name] = getattr(arguments, item.name)
    return changed


def _wants_demo(task: str, chosen: dict[str, str | None]) -> bool:
    """True for the embedded default; a model without data, or data without a model, is an error."""
    model, data = chosen["model_name_or_path"], chosen["dataset_name"]
    if model and not data:
        raise UsageError(f"--model_name_or_path {model} needs --dataset_name: a file, a folder or a hub id.")
    if data and not model:
        raise UsageError(f"--dataset_name {data} needs --model_name_or_path: a folder or a hub id.")
    if not model and task != "causal-lm":
        raise UsageError(f"--task {task} needs --model_name_or_path and --dataset_name; the demo is a causal-lm.")
    return not model


def _peek(argv: Sequence[str], recipe: dict[str, Any], name: str) -> str | None:
    """Value of one flag before the real parser exists, which depends on it."""
    for position, word in reversed(list(enumerate(argv))):
        for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
            if word == spelling and position + 1 < len(argv):
                return argv[position + 1]
            if word.startswith(spelling + "="):
                return word.split("=", 1)[1]
    return recipe.get(name)


def _read_recipe(argv: Sequence[str]) -> dict[str, Any]:
    """The mapping in the file after `--config`; empty without one."""
    if "--config" not in argv:
        return {}
    position = list(argv).index("--config") + 1
    if position == len(argv):
        raise UsageError("--config needs the path of a YAML file.")
    path = Path(argv[position])
    if not path.is_file():
        raise UserError(f"--config {path}: there is no such file (working directory: {Path.cwd()}).")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} holds {type(recipe).__name__}; write one `flag: value` per line.")
    return recipe


def _refuse_unknown(names: Any, known: set[str], what: str, unless_empty: Sequence[str] | None = None) -> None:
    """Raises for the first name that no flag has, with the flags that look like it."""
    if unless_empty is not None and not unless_empty:
        return
    for name in names:
        if name.replace("-", "_") in known:
            continue
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=3)
        hint = f" Did you mean {' or '.join('--' + n for n in near)}?" if near else " See --help for all of them."
        raise UsageError(f"unknown {what} {name!r}.{hint}")


def command_line() -> str:
    """The command as typed, for the summary."""
    return " ".join(sys.argv)
