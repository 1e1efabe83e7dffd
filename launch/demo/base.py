"""The demo's base model: a tiny Llama over bytes, pre-trained on the spot and kept in the user's cache folder.

One process of a machine builds it while the others wait for its file lock, which ends with the process that holds it.
Nothing is exchanged between ranks, so that a failure here ends the run through the launcher, like any other.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from launch.checks.errors import UserError
from launch.demo import tasks as demo_tasks

SEED = 0
STEPS = 700
BATCH = 64
LEARNING_RATE = 3e-3
WARMUP, DECAY_FROM = 30, 0.7
WAIT_SECONDS = 1800.0
PAD, EOS = "<pad>", "<eos>"


def cache_folder() -> Path:
    """Where the base model is kept: named after everything that its weights depend on."""
    recipe = Path(__file__).read_bytes() + Path(demo_tasks.__file__).read_bytes()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ds_moelora" / f"demo-base-{hashlib.sha256(recipe).hexdigest()[:12]}"


def base_model() -> Path:
    """Folder with the base model and its tokenizer; builds it if this machine does not have it, or not as a whole."""
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=WAIT_SECONDS):
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                tokenizer = byte_tokenizer()
                _pretrain(tokenizer).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                Console(markup=False, emoji=False).print(f"The demo's base model is kept in {folder}")
    except Timeout as error:
        raise UserError(f"another process has not built {folder} within {WAIT_SECONDS:.0f} s; end it.") from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether config, tokenizer and weights are there and can be read; a cleaner or a full disk may have cut them."""
    try:
        LlamaConfig.from_json_file(folder / "config.json")  # from_pretrained makes up a missing one
        PreTrainedTokenizerFast.from_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as weights:
            return bool(weights.keys())
    except Exception:  # whatever it is, the folder is only a cache
        return False


def describe_base(folder: str | Path) -> None:
    """Writes what the base model will be, its config and tokenizer, to check a run on before the model is built."""
    tokenizer = byte_tokenizer()
    config = _config(tokenizer)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=64
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )


def _pretrain(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A plain loop rather than a Trainer, whose distributed set-up would make this rank wait for the others."""
    set_seed(SEED)
    model = LlamaForCausalLM(_config(tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule)
    rng = random.Random(SEED)
    threads = torch.get_num_threads()
    # The other ranks of this machine are waiting: their cores are free.
    free = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * threads
    torch.set_num_threads(max(threads, min(os.cpu_count() or 1, free)))
    try:
        for _ in tqdm(range(STEPS), desc="Pre-training the demo's base model (once)", unit="step"):
            loss = model(**_batch(tokenizer, rng)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
    return model


def _schedule(step: int) -> float:
    """Linear warm-up, then constant, then linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP, (STEPS - step) / (STEPS * (1 - DECAY_FROM)))


def _batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, torch.Tensor]:
    """Lines of the pre-training text, padded on the right; the loss covers the answers, the rest being random."""
    lines = [demo_tasks.pretraining_line(rng) for _ in range(BATCH)]
    encoded = tokenizer(
        [prompt + answer + EOS for prompt, answer in lines], return_tensors="pt", padding=True, padding_side="right"
    )
    labels = encoded["input_ids"].clone()
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in lines])  # one token per byte
    positions = torch.arange(labels.shape[1])
    labels[(positions < prompt_lengths[:, None]) | (encoded["attention_mask"] == 0)] = -100
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
