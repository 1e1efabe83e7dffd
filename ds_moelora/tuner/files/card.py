"""The model card (README.md) of an adapter: PEFT writes one at every save; the part on mixtures of experts is put in.

A new card has our parts only, without the hub's template of empty headings. In an existing card our parts, between two
comments, are replaced in place or added at the end; everything else in it stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from ..config import PATTERNS, RUN_FIELDS, MoELoRAConfig
from ..layer import MoELoRALayer

CARD_FILE = "README.md"
ADAPTER_PART, TRAINING_PART = "adapter", "training"
TAGS = ("mixture-of-experts", "moe-lora", "ds_moelora")
LIBRARIES = {
    "ds_moelora": "ds_moelora",
    "PEFT": "peft",
    "Transformers": "transformers",
    "PyTorch": "torch",
    "DeepSpeed": "deepspeed",
}
AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
_TRAINING = "_ds_moelora_training"
# Always listed. Other fields are listed where they differ from their defaults.
MAIN_FIELDS = ("r", "num_experts", "top_k", "lora_alpha", "scaling", "init_lora_weights", "target_modules")
UNLISTED_FIELDS = (
    *RUN_FIELDS,
    *("inference_mode", "peft_type", "task_type", "base_model_name_or_path", "auto_mapping", "trained_with"),
)


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run adds to the card.

    Args:
        text: Markdown: data, procedure, metrics. datasets: hub ids of the data sets.
        results: for the hub's own table of results; model_name: what they are results of.
    """

    text: str
    datasets: list[str] = field(default_factory=list)
    results: list[EvalResult] = field(default_factory=list)
    model_name: str = "adapter"


def record_training(model: PeftModel, record: TrainingRecord) -> None:
    """Makes every save of `model` from here on put `record` into the card."""
    setattr(model, _TRAINING, record)


@contextmanager
def without_card(model: PeftModel) -> Iterator[None]:
    """Saves of `model` write no card: rendering it takes longer than the rest of a small adapter."""
    model.create_or_update_model_card = lambda output_dir: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def describe_in_card(write: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel.create_or_update_model_card` that describes mixtures, on every `save_pretrained`."""

    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        path = Path(output_dir) / CARD_FILE
        before = path.read_text(encoding="utf-8") if path.exists() else None
        write(self, output_dir)
        if any(isinstance(config, MoELoRAConfig) for config in self.peft_config.values()):
            _complete(self, path, is_new=before is None or _is_template(before))

    return create_or_update_model_card


def describe_before_upload(upload: Callable[..., Any]) -> Callable[..., Any]:
    """`PeftModel._upload_modified_files`, transformers', that writes the card first.

    `push_to_hub` writes the card that is on the hub, or an empty template, over the one that was just saved.
    """

    def upload_modified_files(self: PeftModel, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        self.create_or_update_model_card(str(working_dir))
        return upload(self, working_dir, *args, **kwargs)

    return upload_modified_files


def _is_template(text: str) -> bool:
    """Whether a card has only the lines of transformers' template for a new repository, or of PEFT's."""
    empty = ModelCard.from_template(ModelCardData()).text.splitlines()
    return all(
        line in empty or "has been pushed on the Hub" in line or line.startswith(("### Framework versions", "- PEFT "))
        for line in ModelCard(text).text.splitlines()
    )


def _complete(model: PeftModel, path: Path, is_new: bool) -> None:
    """Puts our parts, tags and results into the card that PEFT has just written."""
    card = ModelCard.load(path)
    record = getattr(model, _TRAINING, None)
    base = str(card.data.get("base_model") or "")
    name = base.rstrip("/").rpartition("/")[2] or type(model.get_base_model()).__name__
    if is_new:
        card.text = f"# {name} with a mixture of LoRA experts\n"
    card.text = _with_part(card.text, ADAPTER_PART, adapter_text(model, base))
    if record is not None:
        card.text = _with_part(card.text, TRAINING_PART, record.text)
        if record.datasets:
            card.data.datasets = sorted({*(card.data.datasets or []), *record.datasets})
        if record.results:
            card.data.model_name, card.data.eval_results = record.model_name, record.results
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    if os.path.isdir(base):  # the hub refuses a card whose base_model is no repository
        card.data.pop("base_model")
        card.data.tags = [tag for tag in card.data.tags if not tag.startswith("base_model:")]
    card.text = card.text.rstrip() + "\n"
    card.save(path)


def _with_part(text: str, name: str, content: str) -> str:
    """`text` with `content` in the place of our part `name`, or at its end."""
    begin, end = f"<!-- ds_moelora: {name}, written at every save -->", f"<!-- ds_moelora: end of {name} -->"
    part = f"{begin}\n\n{content.strip()}\n\n{end}"
    found = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if found.search(text):
        return found.sub(lambda _: part, text, count=1)
    return f"{text.rstrip()}\n\n{part}\n"


def adapter_text(model: PeftModel, base: str) -> str:
    """Markdown: what the adapter is, how it is loaded, and what it was saved with.

    Args:
        base: the base model's folder or hub id; "" if unknown.
    """
    parts = []
    for adapter, config in model.peft_config.items():
        if isinstance(config, MoELoRAConfig):
            heading = "## The adapter" if adapter == "default" else f"## The adapter `{adapter}`"
            parts.append(f"{heading}\n\n{_summary(model, adapter, config, base)}\n\n{_settings(config)}")
    # The heading and the spelling by which PEFT knows that its own line is there.
    versions = "\n".join(f"- {name} {number}" for name, key in LIBRARIES.items() if (number := _version(key)))
    parts.append(f"## How to load it\n\n{_loading(model, base)}")
    parts.append(f"### Framework versions\n\n{versions}")
    return "\n\n".join(parts)


def _summary(model: PeftModel, adapter: str, config: MoELoRAConfig, base: str) -> str:
    layers = [m for m in model.modules() if isinstance(m, MoELoRALayer) and adapter in m.moelora_experts]
    return (
        f"A mixture of {config.num_experts} LoRA experts of rank {config.r} in {len(layers)} layers of "
        f"`{base or type(model.get_base_model()).__name__}`; a router in each layer chooses {config.top_k} of them for "
        "every token:\n\n"
        "    y = W x + s * sum_{i in topk} g_i(x) B_i A_i x\n\n"
        "It was made with ds_moelora, a DeepSpeed plugin with Riemannian optimizers for mixtures of LoRA experts."
    )


def _settings(config: MoELoRAConfig) -> str:
    saved = config.to_dict()
    default = MoELoRAConfig().to_dict()
    names = [*MAIN_FIELDS, *(n for n in saved if saved[n] != default[n] and n not in (*MAIN_FIELDS, *UNLISTED_FIELDS))]
    values = {name: getattr(config, name) if name in PATTERNS else saved[name] for name in names}
    rows = [f"| `{name}` | `{value}` |" for name, value in values.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _loading(model: PeftModel, base: str) -> str:
    base_model = model.get_base_model()
    config = next(c for c in model.peft_config.values() if isinstance(c, MoELoRAConfig))
    task = str(getattr(config.task_type, "value", config.task_type))
    name = AUTO_CLASSES.get(task, type(base_model).__name__)
    labels = f", num_labels={base_model.config.num_labels}" if task == "SEQ_CLS" else ""
    module = "transformers" if type(base_model).__module__.startswith("transformers.") else type(base_model).__module__
    return (
        "```python\n"
        "import ds_moelora  # makes PEFT know this type of adapter; DeepSpeed is not needed\n"
        "from peft import PeftModel\n"
        f"from {module} import {name}\n\n"
        f'base = {name}.from_pretrained("{base or "BASE_MODEL"}"{labels})\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER_OR_REPOSITORY")\n'
        "```"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
