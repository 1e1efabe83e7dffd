"""Writes an adapter folder that has not been trained, for front ends that make no mixture but go on with an adapter.

  python -m ds_moelora init-adapter --model meta-llama/Llama-3.2-1B --output start --num_experts 8

LLaMA-Factory takes the folder as adapter_name_or_path, ms-swift as --adapters, axolotl as lora_model_dir. The flags of
the mixture are those of launch/train.py. Weights of the base model are read only where the start needs them
(--init_lora_weights goat and its like, --modules_to_save). docs/front_ends.md has each front end's own traps.
"""

from __future__ import annotations

import argparse
from dataclasses import make_dataclass

from transformers import HfArgumentParser

from ..integrations.untrained import TASKS, init_adapter
from ..tuner.config import RUN_FIELDS
from ..tuner.flags import adapter_flags, config_from_flags

SUMMARY = "an adapter folder to start from, for LLaMA-Factory, ms-swift and axolotl"
FLAGS = adapter_flags(without=RUN_FIELDS)  # what a run decides is not in a folder


def parents() -> list[argparse.ArgumentParser]:
    """The mixture's flags."""
    return [HfArgumentParser(make_dataclass("AdapterFlags", FLAGS), add_help=False)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `init-adapter` itself."""
    parser.add_argument("--model", required=True, help="base model: a folder or hub id")
    parser.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--task", choices=TASKS, default="causal-lm", help="default: causal-lm")
    parser.add_argument("--seed", type=int, default=42, help="of the random factors (default: 42)")
    parser.add_argument("--dtype", default="auto", help="of the base weights, where they are read (default: as stored)")
    parser.add_argument("--revision", help="of the base model on the hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository brings")


def run(args: argparse.Namespace) -> int:
    """Writes the folder and says what is in it.

    Raises:
        ValueError: as `init_adapter`, or a value of the mixture out of its bounds.
    """
    config = config_from_flags({name: getattr(args, name) for name, _, _ in FLAGS}, revision=args.revision)
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    made = init_adapter(args.model, config, args.output, args.task, args.seed, args.dtype, **hub)
    print(f"{args.output}: mixtures in {made['modules']} modules, {made['parameters']:,} parameters.")
    return 0
