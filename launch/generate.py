"""Lets an adapter (or a base model) answer prompts; needs no DeepSpeed.

    python launch/generate.py --adapter outputs/demo --prompt 'rev:abc=' 'upp:xyz='
    python launch/generate.py --adapter outputs/chat             # asks for prompts, one per line
    python launch/generate.py --adapter outputs/alpaca --prompt_file questions.txt --json

Prompts are worded as those that the adapter was trained on, which its adapter_config.json remembers; --prompt_template
words them otherwise. docs/evaluation.md has more.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: Python put this folder first on the path; the repository's root is what is needed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch import quiet  # isort: skip  (before DeepSpeed is imported)

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from launch.checks.arguments import read_flags
from launch.checks.errors import UserError, run_guarded
from launch.checks.flags import NO_TEMPLATE, TEMPLATES, DataArguments, flag
from launch.data.answering import prompt_tokens, write_answers
from launch.data.causal import causal_rows
from launch.training.loading import (
    SourceArguments,
    find_source,
    inference_precision,
    load_for_inference,
    load_processor,
    quieten,
)
from launch.training.remembered import settle_template


@dataclass
class GenerationArguments(SourceArguments):
    """Which model answers which prompts, and how."""

    prompt: list[str] = field(default_factory=list, metadata={"help": "One or several prompts."})
    prompt_file: str | None = flag(None, "A text file with one prompt per line. Neither: prompts are read from stdin.")
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "What is made of a prompt: nothing (none), an instruction in Stanford Alpaca's wording (alpaca), a "
            "line (plain), or a user's message in the tokenizer's chat template (chat). Default: as in training.",
            "choices": [NO_TEMPLATE, *TEMPLATES],
        },
    )
    system: str | None = flag(None, "With --prompt_template chat: the system message.")
    max_new_tokens: int = flag(256, "Longest answer in tokens.")
    batch_size: int = flag(8, "Prompts that are answered together (--prompt, --prompt_file).")
    temperature: float = flag(0.0, "0: the most probable token each time; above: sampled from logits / temperature.")
    top_p: float = flag(1.0, "With a temperature: sample from the most probable tokens up to this probability.")
    top_k: int = flag(0, "With a temperature: sample from so many most probable tokens; 0: from all.")
    repetition_penalty: float = flag(1.0, "Above 1: tokens that occurred become less probable.")
    seed: int = flag(42, "Of the sampling.")
    json: bool = flag(False, "One JSON object per answer instead of text.")

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (holds, bound) in bounds.items():
            if not holds:
                raise UserError(f"--{name} {getattr(self, name)} must be {bound}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise UserError("--top_p and --top_k have no effect without --temperature, e.g. --temperature 0.7.")
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt_file both name the prompts; keep one.")

    def options(self) -> dict[str, Any]:
        """For `model.generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Answers all prompts; returns the answers, or [] where they were asked for one by one."""
    quieten()
    (wish,) = read_flags((GenerationArguments,), sys.argv[1:] if argv is None else argv, "launch/generate.py")
    prompts = wish.prompt or (_read_prompts(wish.prompt_file) if wish.prompt_file else [])
    source = find_source(wish, "causal-lm")
    wish.prompt_template = settle_template(wish.prompt_template, source.trained, NO_TEMPLATE)
    if wish.system is not None and wish.prompt_template != "chat":
        raise UserError("--system has no effect without --prompt_template chat.")
    tokenizer = load_processor(source)
    model = load_for_inference(source, tokenizer)
    set_seed(wish.seed)

    def answer(texts: list[str], **more: Any) -> list[str]:
        options = {**wish.options(), **more}
        return write_answers(model, tokenizer, worded(texts, wish, tokenizer), wish.batch_size, **options)

    with inference_precision(model, source.dtype):
        if prompts:
            answers = answer(prompts, title="Answers" if len(prompts) > wish.batch_size else None)
            for text, written in zip(prompts, answers, strict=True):
                plain = written if len(prompts) == 1 else f"> {text}\n{written}\n"
                print(_as_json(text, written) if wish.json else plain, file=quiet.answers(), flush=True)
            return answers
        for text in _typed_prompts():
            streamer = None if wish.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            (written,) = answer([text], streamer=streamer)
            if wish.json:
                print(_as_json(text, written), flush=True, file=quiet.answers())
    return []


def worded(texts: list[str], wish: GenerationArguments, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What the model reads. Worded as in training, by the same function."""
    if wish.prompt_template == NO_TEMPLATE:
        return [prompt_tokens(text, tokenizer) for text in texts]
    system = {} if wish.system is None else {"system": [wish.system] * len(texts)}
    rows = Dataset.from_dict({"instruction": texts, "output": ["-"] * len(texts), **system})
    run = DataArguments(prompt_template=wish.prompt_template)
    prompts = causal_rows(rows, run, f"--prompt_template {wish.prompt_template}", tokenizer)["prompt"]
    return [prompt_tokens(prompt, tokenizer) for prompt in prompts]


def _read_prompts(name: str) -> list[str]:
    try:
        prompts = [line for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {name} cannot be read as UTF-8 text (from {Path.cwd()}): {error}") from error
    if not prompts:
        raise UserError(f"--prompt_file {name} has no line with text.")
    return prompts


def _typed_prompts() -> Iterator[str]:
    """Lines from stdin until it ends."""
    if sys.stdin.isatty():
        print("One prompt per line; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _as_json(prompt: str, answer: str) -> str:
    return json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False)


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
