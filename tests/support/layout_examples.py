"""One small data set of every layout, and its preview.

python -m tests.support.layout_examples docs/data.md   # writes the previews between the two marks in that file
python -m tests.support.layout_examples FOLDER         # writes the data sets and a config, to try the command on
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from launch.data import preview
from launch.demo.base import byte_tokenizer

MARKS = ("<!-- previews -->\n", "<!-- end of previews -->\n")
SIZE = 16  # of pictures
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATION = [("user", "What is 2 + 3?"), ("assistant", "5"), ("user", "And 5 + 4?"), ("assistant", "9")]
SHAREGPT = {"user": "human", "assistant": "gpt"}


@dataclass
class Example:
    """A layout.

    Args:
        title: its name. files: the data files' names. flags: what the preview gets beside model and data.
        model: the folder of the model's config.
    """

    title: str
    files: list[str]
    flags: list[str]
    model: str = "model"


FORMATS = ("--prompt_format", "Q: {{ query }} A:", "--completion_format", " {{ response | lower }}")
EXAMPLES = [
    Example("Alpaca rows", ["alpaca.jsonl"], []),
    Example("The same, worded by the tokenizer's chat template", ["alpaca.jsonl"], ["--prompt_template", "chat"]),
    Example(
        "Columns under other names", ["math.csv"], ["--instruction_column", "query", "--output_column", "response"]
    ),
    Example("Prompt and completion", ["pairs.csv"], []),
    Example("Messages", ["messages.json"], ["--rows", "2"]),
    Example("ShareGPT conversations", ["sharegpt.jsonl"], ["--rows", "2"]),
    Example("A text column", ["texts.parquet"], []),
    Example("A text file: one row per paragraph", ["notes.txt"], ["--rows", "2"]),
    Example("A folder written by `save_to_disk`", ["on_disk"], []),
    Example(
        "Two data sets with weights, the longer rows cut",
        ["pairs.csv", "notes.txt"],
        ["--dataset_weights", "0.5", "0.5", "--max_length", "24", "--rows", "2"],
    ),
    Example("Packed", ["pairs.csv", "notes.txt"], ["--packing", "--max_length", "64"]),
    Example("Streamed", ["alpaca.jsonl"], ["--streaming", "--max_steps", "10"]),
    Example("Columns worded by templates", ["math.csv"], list(FORMATS)),
    Example("Classification of two texts", ["rte.jsonl"], ["--task", "sequence-classification"]),
    Example("Classification of pictures", ["pictures"], ["--task", "image-classification"], "clip"),
    Example("Questions about pictures", ["questions.parquet"], ["--task", "image-text-to-text"], "llava"),
]


def write_examples(folder: Path) -> None:
    """Writes the data sets, and what a preview reads of a model: its config, and its tokenizer or processor."""
    _write_models(folder)
    _write_texts(folder)
    _write_pictures(folder)


def _write_models(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, 1024
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    text.save_pretrained(folder / "model")
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=SIZE // 2, **sizes)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pictures.save_pretrained(folder / "clip")
    CLIPConfig(vision_config=vision.to_dict(), text_config=sizes).save_pretrained(folder / "clip")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=4
    ).save_pretrained(folder / "llava")
    LlavaProcessor(
        pictures, tokenizer, patch_size=SIZE // 2, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder / "llava")


def _write_pictures(folder: Path) -> None:
    for name in ("red", "blue"):
        (folder / "pictures" / name).mkdir(parents=True)
        Picture.new("RGB", (SIZE, SIZE), name).save(folder / "pictures" / name / "1.png")
    rows = {"image": [Picture.new("RGB", (SIZE, SIZE), "red")], "prompt": ["Which colour?"], "completion": ["Red."]}
    text = Value("string")
    features = Features({"image": Image(), "prompt": text, "completion": text})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "questions.parquet")


def _write_texts(folder: Path) -> None:
    _write_lines(
        folder / "alpaca.jsonl",
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
        {"instruction": "Name a prime.", "input": "", "output": "7"},
    )
    Dataset.from_dict({"query": ["What is 2 + 3?"], "response": ["The answer is 5."]}).to_csv(folder / "math.csv")
    pairs = Dataset.from_dict({"prompt": ["2 + 3 = ", "Three primes: "], "completion": ["5", "2, 3, 5"]})
    pairs.to_csv(folder / "pairs.csv")
    pairs.save_to_disk(folder / "on_disk")
    messages = [{"role": role, "content": content} for role, content in CONVERSATION]
    (folder / "messages.json").write_text(json.dumps([{"messages": messages}]))
    shared = [{"from": SHAREGPT[role], "value": content} for role, content in CONVERSATION]
    _write_lines(folder / "sharegpt.jsonl", {"conversations": shared})
    Dataset.from_dict({"text": ["A prime has two divisors."]}).to_parquet(folder / "texts.parquet")
    (folder / "notes.txt").write_text("A prime has two divisors.\n\nOne has only one,\nand is no prime.\n")
    rte = {"sentence1": "It rains in Rome.", "sentence2": "Rome is wet.", "label": "entailment"}
    _write_lines(folder / "rte.jsonl", rte, {**rte, "sentence2": "Rome is dry.", "label": "not_entailment"})


def _write_lines(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def previews() -> Iterator[tuple[Example, str]]:
    """Every example with what the preview prints for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder)
        for example in EXAMPLES:
            files = [str(folder / file) for file in example.files]
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                preview.main(
                    [
                        "--model_name_or_path",
                        str(folder / example.model),
                        "--dataset_name",
                        *files,
                        *example.flags,
                        "--no-color",
                    ]
                )
            AcceleratorState._reset_state(reset_partial_state=True)
            yield example, output.getvalue().replace(preview.LEGEND, "")  # docs/data.md says it once


def as_markdown() -> str:
    """The previews as they stand in docs/data.md."""
    parts = []
    for example, output in previews():
        command = shlex.join(["--dataset_name", *example.files, *example.flags])
        parts.append(f"**{example.title}**: `{command}`\n\n```text\n{output.rstrip()}\n```\n")
    return "\n".join(parts)


def update(path: Path) -> None:
    """Replaces what stands between the two marks in `path`."""
    head, rest = path.read_text().split(MARKS[0])
    _, tail = rest.split(MARKS[1])
    text = f"{head}{MARKS[0]}\n{as_markdown()}\n{MARKS[1]}{tail}"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.suffix == ".md":
        update(target)
    else:
        target.mkdir(parents=True, exist_ok=True)
        write_examples(target)
