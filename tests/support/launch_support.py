"""What the launcher's tests share: a tiny model on disk, data files, and runs of the real launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ds_moelora.checkpoint.manifest import write_manifest
from launch.cluster.processes import find_free_port
from launch.data.values import read_batch
from launch.demo.base import byte_tokenizer
from tests.support.forks import ROOT, run_ranks, start_forked

TRAIN = ROOT / "launch" / "train.py"
# Of a run that is over soon.
SMALL = ["--lora_r", "2", "--num_experts", "2", "--top_k", "1", "--per_device_train_batch_size", "2", "--seed", "3",
         "--logging_steps", "1"]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_model(folder: Path, chat_template: str | None = None, hidden_size: int = 32) -> Path:
    """A two-layer Llama over bytes with random weights, and its tokenizer, as a hub model looks on disk."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=max(48, hidden_size),
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(rows: Any) -> list[dict[str, Any]]:
    """Rows as the launcher reads them, whatever file they are from."""
    return [row for number, raw in enumerate(rows)
            for _, row in read_batch({name: [value] for name, value in raw.items()}, [number], "")]  # fmt: skip


def alpaca_rows(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(count)]


def question_rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"is {i} even?", "label": "yes" if i % 2 == 0 else "no"} for i in range(count)]


STATE: dict[str, Any] = {"tensors": {}, "parameters": {}, "record": {}}
STATE["run"] = {"counters": {}, "scheduler": None, "loss_scale": None}  # of a manifest, as empty as can be


def save_checkpoint(output_dir: Path, step: int) -> Path:
    """A checkpoint with a few files and a manifest."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "inside").mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "inside" / "data").write_bytes(bytes(range(200)))
    (folder / "empty").touch()
    write_manifest(folder, STATE)
    return folder


def assert_same_adapter(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """Two folders hold one adapter: to the bit, or up to a share of each tensor's norm."""
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        same = torch.equal(got[name], tensor)
        assert same or (tolerance and (got[name] - tensor).norm() <= tolerance * (tensor.norm() + 1e-3)), name


@dataclass
class Finished:
    """A run of the launcher that has ended."""

    code: int
    output: str
    seconds: float


def launch(arguments: list[str], ranks: int = 2, script: Path | None = None, timeout: float = 600.0) -> Finished:
    """What `deepspeed --num_gpus <ranks> launch/train.py <arguments>` does, on a free port.

    The ranks are forked with their imports done (`tests.support.forks`): a run of two takes 5 s of a core instead of
    30 s. As under DeepSpeed's launcher, a rank that fails ends the others, and its code is the run's. The command
    `deepspeed` itself runs in test_failures.py::test_supervised.

    Raises:
        AssertionError: still running after `timeout` seconds (all its processes are ended).
    """
    port, started = find_free_port(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = str(script or TRAIN), arguments, ranks, launch_environment(), port, str(log)
        process = start_forked(run_ranks, *words, daemon=False)
        process.join(timeout)
        output = log.read_text(errors="replace")
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{output[-4000:]}")
    # DeepSpeed's collectives for inference would leave 69 MB per rank there, in memory.
    left = [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*")]
    assert not left, left
    return Finished(process.exitcode, output, time.monotonic() - started)


def launch_environment() -> dict[str, str]:
    """What a run of the launcher is started with."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
