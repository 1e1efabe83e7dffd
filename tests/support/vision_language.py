"""A tiny LLaVA with its processor, and questions about pictures, as they look on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from launch.demo.base import byte_tokenizer

SIZE, PATCH = 16, 8
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llava(folder: Path) -> Path:
    """CLIP's vision model and a Llama over bytes, random weights: four tokens per picture."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.model_max_length = 4096
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIZE, patch_size=PATCH, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" leaves out again
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def write_questions(path: Path, count: int) -> Path:
    """Rows in A-OKVQA's layout, as parquet: the answer is the picture's colour."""
    generator = np.random.default_rng(0)
    rows: dict[str, list] = {"image": [], "question": [], "choices": [], "correct_choice_idx": []}
    for number in range(count):
        pixels = generator.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
        pixels[..., 2 * (number % 2)] += 120
        rows["image"].append(Picture.fromarray(pixels))
        rows["question"].append("Which colour?")
        rows["choices"].append(["red", "blue"])
        rows["correct_choice_idx"].append(number % 2)
    features = {"image": Image(), "question": Value("string"), "choices": List(Value("string")),
                "correct_choice_idx": Value("int64")}  # fmt: skip
    Dataset.from_dict(rows, features=Features(features)).to_parquet(path)
    return path
