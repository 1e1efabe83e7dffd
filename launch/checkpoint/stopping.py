"""Stops training at the same step on every rank: before a preemption, or when the loss is no longer a number.

What a rank knows alone (it got a signal; its loss is not finite) is exchanged at the end of every step: two integers
per rank, over gloo between hosts' CPUs, whatever the training's own backend is. Nothing waits for an accelerator: the
flag of a step's loss is read when the next step has been queued, and the exchange is read one step after it began.

    signal during step s     all ranks stop after step s + 1, save and leave with exit code 0
    signal during an evaluation     the evaluation ends one batch later, and training with it; the state is saved
    losses of steps s - n + 1 ... s not finite     all ranks stop after step s + 2 with an error
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from launch.checkpoint.resume import newest_complete
from launch.checks.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EvaluationSkipped(Exception):  # noqa: N818  (no error)
    """A rank got a signal; raised at the same batch on every rank."""


class Exchange:
    """An all-gather of flags that has begun: `mine` of every rank. Without a group there is one rank."""

    def __init__(self, group: Any, mine: list[bool]) -> None:
        self._mine = torch.tensor(mine, dtype=torch.long)
        self._all, self._work = [self._mine], None
        if group is not None:
            self._all = [torch.empty_like(self._mine) for _ in range(dist.get_world_size(group))]
            self._work = dist.all_gather(self._all, self._mine, group=group, async_op=True)

    def read(self) -> list[list[int]]:
        """Flag by flag, that of every rank."""
        if self._work is not None:
            self._work.wait()
        return torch.stack(self._all).T.tolist()


class Stopping(TrainerCallback):
    """See the module. `see` takes the loss of every micro-batch; the rest happens between steps.

    Args:
        nan_steps: steps in a row with a loss that is not finite, on any rank, that end the run; 0: never.
    """

    def __init__(self, nan_steps: int) -> None:
        self.nan_steps = nan_steps
        self.preempted = False
        self._signalled = False
        self._bad: Tensor | None = None  # on the device: was a loss of this step not finite?
        self._copy: tuple[Tensor, Any] | None = None  # that flag of the last step, on its way to the host
        self._exchange: tuple[int, Exchange] | None = None  # of a step
        self._asked: Exchange | None = None  # during an evaluation
        self._streaks: list[int] = []  # of every rank
        self._group: Any = None

    def see(self, loss: Tensor) -> None:
        """Notes, without waiting for it, whether a micro-batch's loss is finite."""
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._streaks = [0] * ranks
        if ranks > 1:
            self._group = dist.new_group(backend="gloo")
        for number in SIGNALS:
            signal.signal(number, self._note_signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signalled = self._read_exchange(args.output_dir)
        if signalled and not control.should_training_stop:
            self.preempted = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        bad = self._copy is not None and _read(self._copy)
        self._copy, self._bad = _to_host(self._bad), None
        self._exchange = state.global_step - 1, Exchange(self._group, [self._signalled, bad])

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.during_evaluation()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_evaluation()

    def during_evaluation(self) -> None:
        """After every batch of an evaluation, of which all ranks have equally many.

        Raises:
            EvaluationSkipped: some rank had got a signal at the end of the batch before.
        """
        if self.end_evaluation():
            raise EvaluationSkipped
        self._asked = Exchange(self._group, [self._signalled])

    def end_evaluation(self) -> bool:
        """Reads what is on its way: whether any rank had got a signal."""
        asked, self._asked = self._asked, None
        return asked is not None and any(asked.read()[0])

    def last_step_was_finite(self) -> bool:
        """Whether the step that has just ended had finite losses on all ranks.

        A collective call, which waits for the device: for moments that do so anyway.
        """
        bad = torch.tensor([int(self._copy is not None and _read(self._copy))])
        if self._group is not None:
            dist.all_reduce(bad, group=self._group)
        return not bad.item()

    def _note_signal(self, number: int, frame: Any) -> None:
        self._signalled = True

    def _read_exchange(self, output_dir: str) -> bool:
        """Whether any rank got a signal."""
        if self._exchange is None:
            return False
        step, exchange = self._exchange
        signalled, bad = exchange.read()
        self._streaks = [streak + 1 if wrong else 0 for streak, wrong in zip(self._streaks, bad, strict=True)]
        if self.nan_steps and max(self._streaks) >= self.nan_steps:
            raise UserError(_not_finite(step, self._streaks, output_dir))
        return any(signalled)


def ignore_signals(initialize: Callable[[int], None] | None, worker: int) -> None:
    """First act of a data loader's worker: signals to a whole process tree are the rank's business alone.

    DeepSpeed's launcher signals a rank's children before the rank, which would then fail instead of saving. Workers end
    with their rank in any case.

    Args:
        initialize: the worker's own `worker_init_fn`.
        worker: its number.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


def _to_host(flag: Tensor | None) -> tuple[Tensor, Any] | None:
    """A copy of a device's flag on the host, not there yet, and the event of its arrival (None for a CPU)."""
    if flag is None or flag.device.type == "cpu":
        return None if flag is None else (flag, None)
    copy = torch.empty_like(flag, device="cpu", pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.Event(flag.device)
    event.record()
    return copy, event


def _read(copy: tuple[Tensor, Any]) -> bool:
    flag, event = copy
    if event is not None:
        event.synchronize()  # of a step before the one that is queued: the device has work meanwhile
    return bool(flag)


def _not_finite(step: int, streaks: list[int], output_dir: str) -> str:
    since = {rank: step - streak + 1 for rank, streak in enumerate(streaks) if streak}
    ranks = ", ".join(f"rank {rank} since step {first}" for rank, first in since.items())
    newest = newest_complete(output_dir)
    kept = (
        f"{newest} is from before: lower --learning_rate, or look at the rows of step {min(since.values())}, and go on "
        "from it with --resume_from_checkpoint auto."
        if newest
        else "No checkpoint was saved before: lower --learning_rate, or look at the rows."
    )
    return f"the loss was not finite for {max(streaks)} steps in a row, up to step {step} ({ranks}). {kept}"
