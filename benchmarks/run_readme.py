"""Runs the README's lines of MoE-LoRA, word for word, in whatever environment it is started in: `make package`.

    deepspeed --num_gpus 2 run_readme.py README.md

What the lines take for granted is made up: a tiny Llama in a folder called like the model they name, a DeepSpeed
config, and batches. Needs nothing of this repository but the installed package.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TITLE = "**MoE-LoRA in your own loop:**"
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 2},
}


def lines_of(readme: Path) -> str:
    """The Python block after `TITLE`.

    Raises:
        ValueError: there is none.
    """
    found = re.search(re.escape(TITLE) + r"\s+```python\n(.*?)```", readme.read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"{readme} has no Python block behind {TITLE!r}.")
    return found[1]


def main() -> None:
    readme = next(Path(word) for word in sys.argv[1:] if not word.startswith("--"))  # --local_rank is DeepSpeed's
    code = lines_of(readme.resolve())
    name = re.search(r'from_pretrained\("(.*?)"\)', code)
    assert name is not None, "the lines name a model"
    with tempfile.TemporaryDirectory() as folder:  # one per rank
        os.chdir(folder)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).save_pretrained(name[1])
        Path("ds_config.json").write_text(json.dumps(CONFIG))
        ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
        names: dict[str, Any] = {"batches": [{"input_ids": ids, "labels": ids}] * 20}
        exec(compile(code, str(readme), "exec"), names)
        first = LlamaForCausalLM.from_pretrained(name[1])(**names["batch"]).loss.item()
        engine = names["engine"]
        last = engine(**names["batch"]).loss.item()
        os.chdir("/")
    import ds_moelora

    steps, optimizer = engine.global_steps, type(engine.basic_optimizer).__name__
    print(f"{ds_moelora.__file__}: {steps} steps of {optimizer}, loss {first:.3f} -> {last:.3f}", flush=True)
    if not (steps == len(names["batches"]) and last < first):
        sys.exit("the lines did not train the model")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
