"""A saved mixture as plain PEFT LoRAs, for programs that know nothing of ds_moelora.

  python -m ds_moelora export outputs/run exported

writes one PEFT LoRA per expert (exported/expert_0, ...), one more for what every token gets (exported/always: a shared
expert, the residual of a start from singular values), the routers (router.safetensors), and mixture.json, which says
how they make up the mixture: y = base(x) + sum_i g_i(x) expert_i(x) + always(x). With one expert in every layer the
gate is 1, and the whole adapter is one plain LoRA in the folder itself. docs/export.md has the limits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..tuner.files.export import export_adapter
from .tables import table

SUMMARY = "a saved mixture as plain PEFT LoRAs: one per expert, and the routers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `export`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder with adapter_config.json")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Exports and prints what was written.

    Raises:
        ValueError: as `export_adapter`.
    """
    parts = export_adapter(args.adapter, args.output)
    written = []
    for part in parts:
        folder = Path(args.output, part)
        config = json.loads((folder / "adapter_config.json").read_text())
        size = (folder / "adapter_model.safetensors").stat().st_size
        entry = {"folder": str(folder), "r": config["r"], "lora_alpha": config["lora_alpha"], "bytes": size}
        written.append(entry)
    if args.json:
        print(json.dumps({"adapter": args.adapter, "output": args.output, "loras": written}, indent=2))
        return 0
    rows = [(w["folder"], str(w["r"]), f"{w['lora_alpha']:g}", f"{w['bytes'] / 1e6:.3g}") for w in written]
    print(table("Plain PEFT LoRAs", ("folder", "r", "lora_alpha", "MB"), rows))
    if parts != ["."]:
        print(f"{args.output}/router.safetensors and mixture.json say how they make up the mixture (docs/export.md).")
    return 0
