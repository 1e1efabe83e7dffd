"""launch/train.py with one fault on one rank, for tests: FAULT=<kind>:<rank>:<step>.

The production code has no hooks for this: the functions in which the fault is to happen are replaced here.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ds_moelora.optimizer.sharding.transfer import Transfer
from launch import train
from launch.checkpoint import saving
from launch.training import trainers

KIND, RANK, STEP = os.environ["FAULT"].split(":")
step = 0  # the one being done


def replace(owner: Any, name: str, fault: Any) -> None:
    """`owner.name` does `fault()` first, on the chosen rank in the chosen step."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if step == int(STEP) and os.environ["RANK"] == RANK:
            fault()
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def complain() -> None:
    raise RuntimeError("made up by a test")


def count_steps() -> None:
    original = saving.CheckpointedTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        global step
        step = self.state.global_step + 1
        return original(self, *args, **kwargs)

    saving.CheckpointedTrainer.training_step = training_step


def spoil_losses() -> None:
    """From the chosen step on, the chosen rank's loss is NaN."""
    original = trainers.MixtureSFTTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if step >= int(STEP) and os.environ["RANK"] == RANK else loss

    trainers.MixtureSFTTrainer.compute_loss = compute_loss


def spoil_rates() -> None:
    """In the chosen step every rank's learning rate is NaN, and so are the weights after it; its loss is finite."""
    original = saving.CheckpointedTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.as_run().optimizer.param_groups if self.state.global_step + 1 == int(STEP) else []:
            group["lr"] = float("nan")
        return original(self, *args, **kwargs)

    saving.CheckpointedTrainer.training_step = training_step


def preempt_in_evaluation() -> None:
    """The chosen rank gets SIGTERM in the first batch of an evaluation after the chosen step; a third batch fails."""
    original, batches = saving.CheckpointedTrainer.prediction_step, []

    def prediction_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == int(STEP):
            batches.append(1)
            if len(batches) == 1 and os.environ["RANK"] == RANK:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(batches) <= 2, "the evaluation goes on"
        return original(self, *args, **kwargs)

    saving.CheckpointedTrainer.prediction_step = prediction_step


count_steps()
if KIND == "all-reduce":
    replace(Transfer, "__call__", die)
elif KIND == "saving":
    replace(saving, "write_state", complain)
elif KIND == "evaluating":
    preempt_in_evaluation()
elif KIND == "manifest":
    replace(saving, "write_manifest", die)
elif KIND == "end":
    replace(saving.CheckpointedTrainer, "_finalize_training", die)
elif KIND == "nan":
    spoil_losses()
elif KIND == "rate":
    spoil_rates()
else:
    raise ValueError(f"FAULT={os.environ['FAULT']}: unknown kind")

if __name__ == "__main__":
    train.run_guarded(train.main, debug=False)
