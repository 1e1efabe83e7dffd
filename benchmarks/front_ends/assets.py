"""A tiny Llama over bytes, its tokenizer, data in each front end's form, and DeepSpeed configs: all in one folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = 64
STEPS, LR, EPS = 4, 1e-2, 1e-3  # eps far from 0, so that AdamW's first steps are no mere signs of the gradient
OURS = "GateRiemannianAdamW"
# Chosen so that the boundary between two processes' shards of a LoRA, and of a mixture, lies within a row of a factor:
# in models of equal layers it falls between two of them, where no matrix is cut and every optimizer is exact.
SIZES = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 3}
ADAPTER = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
NUM_EXPERTS = 3
# What `accelerate config` would write, for two processes on CPUs.
ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "use_cpu": True,
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "main_training_function": "main",
}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder: Path) -> None:
    """Model and tokenizer, as any version of transformers from 4.55 on reads them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", eos_token="<eos>", model_max_length=128, chat_template=CHAT
    )
    sizes = {**SIZES, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, **heads, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """sft, dpo, kto, grpo (TRL); alpaca.json with dataset_info.json (LLaMA-Factory, axolotl); messages (ms-swift)."""
    rows = {
        "sft/train.jsonl": [{"prompt": f"say {i}", "completion": f" it is {i}"} for i in range(ROWS)],
        "dpo/train.jsonl": [
            {"prompt": f"say {i}", "chosen": f" it is {i}", "rejected": f" no {i * 7}"} for i in range(ROWS)
        ],
        "kto/train.jsonl": [
            {"prompt": f"say {i}", "completion": f" it is {i}", "label": i % 2 == 0} for i in range(ROWS)
        ],
        "grpo/train.jsonl": [{"prompt": f"say {i}"} for i in range(ROWS)],
        "messages.jsonl": [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
            for i in range(ROWS)
        ],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    alpaca = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(ROWS)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))


def write_configs(folder: Path) -> None:
    """stage0.json ... stage3.json, whose optimizer is ours; without optimizer block no_block0.json ...; and loop0.json
    ..., without "auto", for loops that have no arguments to fill it from, and accelerate0.json ... which name those."""
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    for stage in range(4):
        zero = {"stage": stage, **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})}
        config = {**dict.fromkeys(AUTO, "auto"), "steps_per_print": 10**6, "zero_optimization": zero}
        (folder / f"no_block{stage}.json").write_text(json.dumps(config, indent=1))
        config["optimizer"] = {"type": OURS, "params": auto}
        (folder / f"stage{stage}.json").write_text(json.dumps(config, indent=1))
        (folder / f"loop{stage}.json").write_text(json.dumps(loop_config(stage), indent=1))
        (folder / f"accelerate{stage}.json").write_text(
            json.dumps(
                ACCELERATE
                | {"deepspeed_config": {"deepspeed_config_file": f"assets/loop{stage}.json", "zero3_init_flag": False}}
            )
        )


def loop_config(stage: int, micro_batch: int = 2) -> dict[str, Any]:
    """A DeepSpeed config without "auto"."""
    params = {"lr": LR, "betas": [0.9, 0.999], "eps": EPS, "weight_decay": 0.0}
    zero = {"stage": stage, **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": OURS, "params": params},
        "zero_optimization": zero,
    }


def write(folder: Path) -> None:
    """All of it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_data(folder)
    write_configs(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
