"""The launcher's flags: the dataclasses whose fields they are (`launch.checks.arguments` reads them)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from ds_moelora.optimizer.defaults import LEARNING_RATES, default_learning_rate
from ds_moelora.redaction import redact
from ds_moelora.tuner.flags import adapter_flags

TASKS = ("causal-lm", "sequence-classification", "image-classification", "image-text-to-text")
AUTO = "auto"  # --resume_from_checkpoint: the newest complete one, if there is one
SCORED_TASKS = TASKS[:3]  # by launch/evaluate.py
LANGUAGE = ("causal-lm", "image-text-to-text")  # what SFTTrainer trains
DEFAULT_OPTIM = "adamw_torch"
TEMPLATES = ("alpaca", "plain", "chat")  # of instruction rows
NO_TEMPLATE = "none"
LOGGING_STEPS = 10
_RATES = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
FORMATS = ("prompt_format", "completion_format")
# Groups of --help.
SCORING_FLAGS = "scoring"
OTHER_FLAGS = "all other flags of TRL's and transformers' trainers"


def flag(default: Any, help_text: str) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class DataArguments:
    """Which model reads which data for which task."""

    _argument_group_name: ClassVar = "model, data and run"

    task: str = field(
        default="causal-lm",
        metadata={"help": "What is trained.", "choices": list(TASKS)},
    )
    model_name_or_path: str | None = flag(None, "Model: a folder or a hub id. Without model and dataset: the demo.")
    revision: str = flag("main", "Branch, tag or commit of a model from the hub.")
    attn_implementation: str | None = flag(None, "The model's attention: eager, sdpa, flash_attention_2, ...")
    dataset_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training data: a jsonl, json, csv, parquet or txt file, a folder (of such files, or written by "
            "datasets' save_to_disk), or a hub id; several are mixed."
        },
    )
    dataset_config: str | None = flag(None, "Configuration of a dataset from the hub.")
    dataset_split: str = flag("train", "Split of --dataset_name to train on.")
    max_eval_samples: int | None = flag(None, "Use the first N evaluation rows only.")
    prompt_template: str = field(
        default="alpaca",
        metadata={
            "help": "How instruction/input rows become a prompt: alpaca (the Stanford wording), plain (instruction, "
            "input, one per line) or chat (the tokenizer's chat template).",
            "choices": list(TEMPLATES),
        },
    )
    instruction_column: str | None = flag(None, "causal-lm: the column to read as instruction.")
    input_column: str | None = flag(None, "causal-lm: the column to read as input; needs --instruction_column.")
    output_column: str | None = flag(None, "causal-lm: the column to read as output; needs --instruction_column.")
    prompt_column: str | None = flag(None, "causal-lm: the column to read as prompt; needs --completion_column.")
    completion_column: str | None = flag(None, "causal-lm: the column to read as completion.")
    messages_column: str | None = flag(None, "causal-lm: the column to read as messages, in either spelling.")
    prompt_format: str | None = flag(
        None, "causal-lm: a Jinja template that makes the prompt of a row's columns; needs --completion_format."
    )
    completion_format: str | None = flag(None, "causal-lm: the same for the completion.")
    text_column: str | None = flag(None, "The column with the text. Default: see docs/data.md and docs/launcher.md.")
    text_pair_column: str | None = flag(None, "Classification: the second of two texts; needs --text_column.")
    text_pattern: str | None = flag(
        None, "Classification: a regular expression; its first group in each text is what the model reads."
    )
    image_column: str | None = flag(None, "The column with the pictures. Default: image, images, img or picture.")
    label_column: str | None = flag(None, "Classification: the column with the label. Default: label or answer.")
    show_traceback: bool = flag(False, "Show the traceback of errors that are otherwise one message.")


@dataclass
class RunArguments(DataArguments):
    """What training on it needs besides."""

    dataset_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "One weight per data set: how often its rows are drawn. Default: all rows of all, once."},
    )
    dataset_stopping: str = field(
        default="first_exhausted",
        metadata={
            "help": "With weights: stop when the first data set has no rows left, or repeat until all have been read.",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    streaming: bool = flag(False, "causal-lm: read training rows while training, instead of all at the start.")
    eval_dataset_name: str | None = flag(None, "Evaluation data, in the same form as --dataset_name.")
    eval_dataset_split: str | None = flag(None, "Its split. Default: the first of validation, test, train it has.")
    eval_fraction: float = flag(0.0, "Share of the training data set aside for evaluation (instead of a dataset).")
    max_train_samples: int | None = flag(None, "Use the first N training rows of each data set only.")
    init_from_lora: str | None = flag(None, "Folder of a PEFT LoRA: all experts start as it, so that the mixture does.")
    load_in_4bit: bool = flag(False, "Keep the frozen base in 4 bits (NF4), by bitsandbytes. ZeRO 0 to 2.")
    target_parameters: list[str] = field(
        default_factory=list,
        metadata={
            "help": "MoE bases: the adapter is PEFT's LoRA, on these stacked parameters (experts: all of them) and on "
            "--target_modules (none: no modules); with flags of mixtures, mixtures on modules beside it."
        },
    )
    regression: bool = flag(False, "Classification: labels are numbers (STS-B), learnt by least squares.")
    overwrite_output_dir: bool = flag(False, "Accept a non-empty output_dir; its old checkpoints are removed.")
    lost_rank_seconds: float = flag(30.0, "Seconds without a sign of a rank's host until all ranks end.")
    stop_after_nan_steps: int = flag(3, "End after so many steps in a row with a loss not finite; 0: never.")
    verbose: bool = flag(False, "Show progress bars in files, too, and what DeepSpeed and torch repeat.")
    status_file: str | None = flag(None, "launch/supervise.sh reads here how far the run has come.")

    # The adapter that training goes on with (`launch.training.modeling.start_adapter`).
    start_adapter: str | None = field(default=None, init=False)
    # What words the prompts of the data: one of TEMPLATES, or NO_TEMPLATE (`launch.data.sources`).
    template_used: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # a recipe need not write a list of one
            self.dataset_name = [self.dataset_name]


if TYPE_CHECKING:

    class AdapterArguments:
        """The mixture of LoRA experts; each field is the one of the same name in `ds_moelora.MoELoRAConfig`."""

        def __getattr__(self, name: str) -> Any: ...
else:
    _SPACE = {"__module__": __name__, "_argument_group_name": "the mixture of LoRA experts"}
    AdapterArguments = make_dataclass("AdapterArguments", adapter_flags(), namespace=_SPACE)


@dataclass
class ScoringArguments:
    """How a model is scored on evaluation data: while it trains (`launch/train.py`) and afterwards (`evaluate.py`)."""

    _argument_group_name: ClassVar = SCORING_FLAGS

    score: str = field(
        default="auto",
        metadata={
            "help": "causal-lm: answers (written, and compared with the data's), loss (perplexity alone), or auto: "
            "answers if --answer_pattern or --answer_ignore is given.",
            "choices": ["auto", "answers", "loss"],
        },
    )
    answer_pattern: str | None = flag(
        None, "causal-lm: a regular expression; its first group in what the model writes is the answer."
    )
    answer_ignore: list[str] = field(
        default_factory=list,
        metadata={"help": "What answers may differ in: case, punctuation, articles, whitespace, number (spelling)."},
    )
    max_new_tokens: int = flag(64, "causal-lm: longest answer in tokens.")


@dataclass
class _Deferred:
    """This launcher's defaults, in training arguments that wait for the checks.

    `TrainingArguments.__post_init__` opens torch.distributed and parses the DeepSpeed config. It is put off to
    `start()`, so that everything that can be wrong is found before any rank waits for another.
    """

    _argument_group_name: ClassVar = OTHER_FLAGS

    output_dir: str = flag("outputs/run", "Folder for the adapter, checkpoints, TensorBoard logs and the summary.")
    optim: str | None = flag(None, "Only without an optimizer block in the DeepSpeed config: a transformers name.")
    report_to: str = flag("tensorboard", "Where metrics go: tensorboard, none, or another integration's name.")
    learning_rate: float | None = field(
        default=None, metadata={"help": f"Peak rate. Default: the optimizer's ({_RATES}).", "aliases": ["--lr"]}
    )
    logging_first_step: bool = flag(True, "Log the first step.")
    logging_steps: float | None = flag(
        None, f"Report every so many steps. Default: {LOGGING_STEPS}, in short runs so often that there are 20 reports."
    )
    save_total_limit: int | None = flag(2, "Keep the newest N checkpoints, and the best; None: all.")
    include_num_input_tokens_seen: str = flag("non_padding", "Count tokens: no, all or non_padding.")

    def __post_init__(self) -> None:
        """Left to `start()`."""

    reports_often = False  # no field: `logging_steps` was left to the run's length (`launch.training.console`)

    def wants_bf16(self) -> bool:
        """`--bf16`, or what it is by default.

        TRL's own default is bf16 everywhere; transformers refuses that on a machine without an accelerator.
        """
        if self.bf16 is not None:
            return self.bf16
        return not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def start(self) -> None:
        """Completes the arguments; opens torch.distributed."""
        self.bf16 = self.wants_bf16()
        if not torch.accelerator.is_available():
            # Without it accelerate sees no backend for a CPU, and every rank would take itself for the only one.
            self.use_cpu = True
        self.optim = self.optim or DEFAULT_OPTIM
        if self.learning_rate is None:  # without `launch.checks.deepspeed_config`, which has settled it: nothing trains
            self.learning_rate = default_learning_rate(self.optim)
        if self.logging_steps is None:
            self.logging_steps, self.reports_often = LOGGING_STEPS, True
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """What TensorBoard and other integrations write down: transformers hides a flag's token, not a nested one."""
        return redact(super().to_dict())

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle of the arguments holds: no secret, and no object that may hold one."""
        plain = {k: v for k, v in self.__dict__.items() if k not in ("hf_deepspeed_config", "deepspeed_plugin")}
        return redact(plain)

    def __copy__(self) -> Any:
        """Copies within the process keep everything."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


@dataclass
class CausalConfig(_Deferred, SFTConfig):
    """TRL's `SFTConfig`."""

    # The adapter's coefficient, not that of a mixture inside the base model: `AdapterArguments` has the flag.
    router_aux_loss_coef: float | None = field(default=None, init=False)


@dataclass
class HeadConfig(_Deferred, TrainingArguments):
    """transformers' `TrainingArguments`, for models with a classification head."""

    bf16: bool | None = flag(None, "bf16 training. Default: where an accelerator supports it.")
    trust_remote_code: bool = flag(False, "Run code that a model's repository brings. Off unless you trust it.")
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: what `from_pretrained` gets besides."}
    )


@dataclass
class ClassificationConfig(HeadConfig):
    """For sequence-classification."""

    max_length: int = flag(256, "Longest input in tokens; longer texts are cut.")


@dataclass
class ImageConfig(HeadConfig):
    """For image-classification."""

    remove_unused_columns: bool = field(default=False, init=False)  # pictures are processed after columns are read


@dataclass
class ImageTextConfig(CausalConfig):
    """For image-text-to-text: nothing is cut, for a picture's tokens must all be there."""

    max_length: int | None = field(default=None, init=False)


TRAINING_CLASSES = dict(zip(TASKS, (CausalConfig, ClassificationConfig, ImageConfig, ImageTextConfig), strict=True))
