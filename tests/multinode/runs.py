"""What the tests on two hosts run, and what a run left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.launch_support import SMALL, assert_same_adapter


@dataclass(frozen=True)
class Workplace:
    """`folder` has model, data, host files and outputs; `copy` is the repository; `environment` is the user's."""

    folder: Path
    copy: Path
    environment: dict[str, str]

    def script(self, output: str, config: str = "zero2", *more: str) -> list[str]:
        """launch/train.py and its flags, relative to `copy`."""
        return ["launch/train.py", *self.flags(output, config, *more)]

    def flags(self, output: str, config: str = "zero2", *more: str) -> list[str]:
        return ["--deepspeed", f"configs/{config}.json", "--model_name_or_path", str(self.folder / "model"),
                "--dataset_name", str(self.folder / "rows.jsonl"), "--output_dir", str(self.folder / output),
                *SMALL, "--max_steps", "3", "--learning_rate", "1e-2", "--max_length", "256", "--save_strategy", "no",
                "--report_to", "none", *more]  # fmt: skip

    def multinode(self, launcher: str, *words: str, slots: int = 1) -> list[str]:
        hostfile = str(self.folder / f"hosts{slots}")
        return ["bash", "launch/multinode.sh", "--hostfile", hostfile, "--launcher", launcher, *words]

    def losses(self, output: str) -> list[float]:
        """The loss of every step, unrounded."""
        summary: dict[str, Any] = json.loads((self.folder / output / "train_summary.json").read_text())
        assert summary["optimizer"] == "GateRiemannianAdamW"
        assert summary["world_size"] == 2
        losses = [entry["loss"] for entry in summary["log"]]
        assert len(losses) == 3
        return losses

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / output / "adapter_model.safetensors")

    def assert_equal(self, output: str, expected: str) -> None:
        """Losses and adapters of two runs are equal to the bit."""
        assert self.losses(output) == self.losses(expected)
        assert any(tensor.abs().sum() > 0 for name, tensor in self.weights(output).items() if "lora_B" in name)
        assert_same_adapter(self.folder / expected, self.folder / output)
