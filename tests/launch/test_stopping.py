"""When training stops because of a signal or a loss that is not finite: one process, without a model."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl

from launch.checkpoint.stopping import SIGNALS, Stopping
from launch.checks.errors import UserError
from tests.support.failures import FAULTY, ForkedRun
from tests.support.launch_support import alpaca_rows, tiny_model, write_jsonl


@pytest.fixture(autouse=True, scope="module")
def keep_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(stopping: Stopping, losses: list[list[float]], output_dir: str = "nowhere") -> Iterator[TrainerControl]:
    """Steps with the losses of their micro-batches; yields what the Trainer would go by."""
    args, control = SimpleNamespace(output_dir=output_dir), TrainerControl()
    stopping.on_train_begin(args, SimpleNamespace(global_step=0), control)
    for step, micro_losses in enumerate(losses, 1):
        for loss in micro_losses:
            stopping.see(torch.tensor(loss))
        stopping.on_step_end(args, SimpleNamespace(global_step=step), control)
        yield control


@given(
    bad=st.lists(st.sampled_from(["", "", "n", "i", ".n"]), min_size=1, max_size=12),
    limit=st.integers(0, 4),
)
@settings(max_examples=200, deadline=None)
def test_stops_after_so_many_steps_in_a_row(bad: list[str], limit: int) -> None:
    """The verdict on step s comes at the end of step s + 2: one step for the copy, one for the exchange."""
    values = {"n": math.nan, "i": -math.inf, ".": 1.0}
    losses = [[values[letter] for letter in word] or [0.5] for word in bad]
    streak, expected = 0, None
    for step, word in enumerate(bad, 1):
        streak = streak + 1 if set(word) & {"n", "i"} else 0
        if limit and streak == limit and expected is None and step + 2 <= len(bad):
            expected = step
    stopping = Stopping(limit)
    if expected is None:
        assert len(list(train(stopping, losses))) == len(bad)
        assert stopping.last_step_was_finite() == (not set(bad[-1]) & {"n", "i"})
    else:
        steps = train(stopping, losses)
        assert len(list(islice(steps, expected + 1))) == expected + 1
        with pytest.raises(UserError, match=rf"for {limit} steps in a row, up to step {expected} \(rank 0 since step "):
            next(steps)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_next_step(number: signal.Signals, tmp_path: Path) -> None:
    stopping = Stopping(3)
    stops = []
    for step, control in enumerate(train(stopping, [[1.0]] * 6, str(tmp_path)), 1):
        stops.append(control.should_training_stop)
        assert control.should_save == control.should_training_stop == stopping.preempted
        if step == 2:
            signal.raise_signal(number)  # during step 3
    assert stops == [False, False, False, True, True, True]


@pytest.mark.dist
def test_a_signal_ends_an_evaluation(tmp_path: Path) -> None:
    """Rank 1 gets it in the first of four batches: in the midst of training, and of the evaluation at the end."""
    data = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(8))
    flags = ["--model_name_or_path", str(tiny_model(tmp_path / "model")), "--dataset_name", str(data)]
    flags += ["--eval_dataset_name", str(data), "--deepspeed", "configs/zero2.json", "--report_to", "none"]
    flags += ["--lora_r", "2", "--num_experts", "2", "--top_k", "1", "--max_steps", "3", "--save_steps", "3"]
    flags += ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "1"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--resume_from_checkpoint", "auto"]
    for step in (2, 3):
        out = tmp_path / f"out{step}"
        fault = {"FAULT": f"evaluating:1:{step}"}
        run = ForkedRun([*flags, "--output_dir", str(out)], tmp_path / f"log{step}", fault, script=FAULTY)
        assert run.finish() == 0, run.output[-4000:]
        assert (out / f"checkpoint-{step}" / "adapter_model.safetensors").exists()
        if step == 2:
            assert (
                f"Stopped by a signal after step 2; the newest complete checkpoint is {out}/checkpoint-2" in run.output
            )
        else:
            assert (out / "adapter_model.safetensors").exists()
            assert "The evaluation was left out because of a signal" in run.output
            assert "Training summary" in run.output
