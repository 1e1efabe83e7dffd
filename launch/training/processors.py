"""What turns text and pictures into a model's input: tokenizer, image processor, or both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import IMAGE_PROCESSOR_NAME

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError, say

KINDS = {
    "image-classification": (AutoImageProcessor, "image processor"),
    "image-text-to-text": (AutoProcessor, "processor"),
}
Processor = Any  # PreTrainedTokenizerBase, BaseImageProcessor or ProcessorMixin


def load_processor(
    name: str, task: str, trust_remote_code: bool, revision: str | None = None, adapter: str | None = None
) -> Processor:
    """The processor saved with an adapter, otherwise that of the model `name`. Its tokenizer, if any, can pad."""
    kind, called = KINDS.get(task, (AutoTokenizer, "tokenizer"))
    own = IMAGE_PROCESSOR_NAME if task == "image-classification" else "tokenizer_config.json"
    if adapter is not None and (Path(adapter) / own).is_file():
        name, revision = adapter, None
    options = {} if revision is None else {"revision": revision}
    try:
        found = kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # a damaged tokenizer.json can raise anything
        raise UserError(f"--model_name_or_path {name}: no {called}: {error}") from error
    if task == "image-text-to-text" and not isinstance(found, ProcessorMixin):
        raise UserError(
            f"--model_name_or_path {name} has a {type(found).__name__}, not a processor of pictures and text. For a "
            "model of text alone use --task causal-lm."
        )
    tokenizer = tokenizer_of(found)
    if tokenizer is None:
        return found
    if task == "causal-lm" and tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token; set eos_token in it.")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {name} has no padding token; set pad_token in it.")
        tokenizer.pad_token = tokenizer.eos_token
    return found


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a processor; None for one of pictures alone."""
    found = getattr(processor, "tokenizer", processor)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def processor_of_run(arguments: Arguments) -> Processor:
    """The processor of a run, with the chat template and the special tokens that its flags name."""
    run, training = arguments.run, arguments.training
    processor = load_processor(
        run.model_name_or_path, run.task, training.trust_remote_code, run.revision, run.start_adapter
    )
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return processor
    if getattr(training, "chat_template_path", None) is not None:
        _adopt_template(training, processor, tokenizer)
    for name in ("eos_token", "pad_token"):
        token = getattr(training, name, None)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise UserError(f"--{name} {token!r} is no token of {tokenizer.name_or_path}; choose one that it has.")
        setattr(tokenizer, name, token)
    return processor


def _adopt_template(training: Any, processor: Processor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Takes over a chat template, and the token that ends an answer in it.

    TRL's own way adds the other tokenizer's tokens and resizes the model inside the adapter, after which the adapter
    fits no base model. So a template that needs tokens of its own is refused.
    """
    path = training.chat_template_path
    if os.path.isfile(path):
        try:
            template = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--chat_template_path {path}: byte {error.start} is not UTF-8.") from error
    else:
        template = _template_of(path, training, tokenizer)
    processor.chat_template = tokenizer.chat_template = template
    training.chat_template_path = None  # done; TRL would resize the model


def _template_of(path: str, training: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of another model's tokenizer."""
    try:
        source = AutoTokenizer.from_pretrained(path, trust_remote_code=training.trust_remote_code)
        template = source.get_chat_template()
    except Exception as error:
        raise UserError(
            f"--chat_template_path {path} is neither a template file nor a tokenizer with a chat template: {error}"
        ) from error
    known = tokenizer.get_vocab()
    written = {t.content for t in source.added_tokens_decoder.values() if t.content in template}
    lacking = sorted({*written, source.eos_token} - {*known, None})
    if lacking:
        raise UserError(
            f"--chat_template_path {path}: its template writes {', '.join(lacking)}, which this model's tokenizer "
            "lacks: the model has no row for them. Choose a template of the model's own tokens, or a model that "
            "has these."
        )
    if training.eos_token is None and source.eos_token is not None:
        training.eos_token = source.eos_token
        say(f"--chat_template_path {path}: answers end with its {source.eos_token}.")
    return template
