"""Kills random ranks at random moments of a run that restarts itself: `python -m tests.soak` (or `make soak`).

launch/supervise.sh runs the real launcher with two ranks. Each kill is a SIGKILL, to a random rank, some time after a
random step was seen or, for one in six, while the ranks start. The run must end with the weights of a run without
kills, to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.checkpoint.resume import checkpoints, newest_complete
from tests.support.failures import BATCH, SETTINGS, Run, deepspeed_command, losses_of
from tests.support.launch_support import ROOT, alpaca_rows, tiny_model, write_jsonl

ATTEMPT_ENDED = "[supervise] exit code"


@dataclass(frozen=True)
class Kill:
    """What was done, and how long the other processes of the attempt lived on."""

    rank: int
    step: int | None  # the last one seen before; None: while starting
    seconds: float


class Soak:
    """A supervised run and what kills its ranks.

    Args:
        arguments: of launch/train.py, without steps and output folder.
        output_dir: the run's.
        steps: of the run.
        seed: of ranks and moments.
    """

    def __init__(self, arguments: list[str], output_dir: Path, steps: int, seed: int) -> None:
        self.steps, self.random = steps, random.Random(seed)
        supervise = [str(ROOT / "launch" / "supervise.sh"), "--pause", "0", "--restarts", "1000", "--stuck", "0"]
        command = deepspeed_command([*arguments, "--max_steps", str(steps), "--output_dir", str(output_dir)])
        self._since = 0  # where the output of this attempt begins
        self.run = Run([*supervise, *command], output_dir.with_name(f"{output_dir.name}.log"))

    def kill(self, count: int, while_starting: float = 1 / 6) -> list[Kill]:
        """Kills `count` times, between the first and the last tenth of the run; returns what it did."""
        targets = sorted(self.random.sample(range(self.steps // 10, self.steps - self.steps // 10), count))
        return [self.kill_at(None if self.random.random() < while_starting else step) for step in targets]

    def kill_at(self, step: int | None) -> Kill:
        """Kills a random rank, some time after a step of this attempt was seen; None: while it starts."""
        ended = self.run.output.count(ATTEMPT_ENDED)
        rank = self.random.randrange(2)
        if step is None:
            self._wait(lambda: len(self._ranks()) == 2)
            time.sleep(self.random.uniform(0, 8))
        else:
            self.wait_for_step(step)
            time.sleep(self.random.uniform(0, 0.6))
        seen = self._newest_step()
        os.kill(self.run.rank(rank), signal.SIGKILL)
        killed = time.monotonic()
        self._wait(lambda: self.run.output.count(ATTEMPT_ENDED) > ended)
        self._since = len(self.run.output)
        return Kill(rank, seen, time.monotonic() - killed)

    def wait_for_step(self, step: int) -> None:
        """Until this attempt has done a step, or a later one."""
        self._wait(lambda: (self._newest_step() or -1) >= step)

    def _ranks(self) -> set[str]:
        return {rank for rank in self.run.processes().values() if rank is not None}

    def _newest_step(self) -> int | None:
        found = re.findall(rf"'step': '(\d+)/{self.steps}'", self.run.output[self._since :])
        return int(found[-1]) if found else None

    def _wait(self, condition, timeout: float = 400.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.run.code() is None, f"ended too early:\n{self.run.output[-4000:]}"
            assert time.monotonic() < deadline, f"nothing for {timeout} s:\n{self.run.output[-4000:]}"
            time.sleep(0.05)


def differences(reference: Path, output_dir: Path, step: int) -> list[str]:
    """What a finished run has otherwise than the reference: losses of steps, tensors of the adapter."""
    newest = newest_complete(output_dir)
    assert newest is not None
    assert newest.name == f"checkpoint-{step}"
    losses = [losses_of(path / newest.name) for path in (reference, output_dir)]
    found = [f"loss of step {n}: {a} != {b}" for n, (a, b) in enumerate(zip(*losses, strict=True), 1) if a != b]
    adapters = [load_file(path / "adapter_model.safetensors") for path in (reference, output_dir)]
    assert adapters[0].keys() == adapters[1].keys()
    return found + [name for name, tensor in adapters[0].items() if not torch.equal(tensor, adapters[1][name])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        model, data = tiny_model(root / "model"), write_jsonl(root / "rows.jsonl", alpaca_rows(100))
        arguments = [*SETTINGS, *BATCH, "--save_steps", "5", "--save_total_limit", "2",
                     "--model_name_or_path", str(model), "--dataset_name", str(data)]  # fmt: skip
        whole = Run(
            deepspeed_command([*arguments, "--max_steps", str(options.steps), "--output_dir", str(root / "whole")]),
            root / "whole.log",
        )
        assert whole.finish(timeout=900) == 0, whole.output[-4000:]
        began = time.monotonic()
        soak = Soak(arguments, root / "soaked", options.steps, options.seed)
        try:
            kills = soak.kill(options.kills)
            assert soak.run.finish(timeout=900) == 0, soak.run.output[-4000:]
        finally:
            left = soak.run.end()
        for number, kill in enumerate(kills, 1):
            moment = "while starting" if kill.step is None else f"after step {kill.step}"
            print(f"kill {number}: rank {kill.rank} {moment}; all had exited {kill.seconds:.1f} s later")
        different = differences(root / "whole", root / "soaked", options.steps)
        longest = max(kill.seconds for kill in kills)
        passed_over = soak.run.output.count("is passed over")
        print(
            f"{len(kills)} kills, {soak.run.output.count(ATTEMPT_ENDED)} restarts, {options.steps} steps in "
            f"{time.monotonic() - began:.0f} s; longest time until all had exited {longest:.1f} s; "
            f"incomplete checkpoints passed over: {passed_over}; processes left: {len(left)}; "
            f"checkpoints kept: {[path.name for path in checkpoints(root / 'soaked')]}; "
            f"differences from the run without kills: {different or 'none, to the bit'}"
        )
        raise SystemExit(1 if different or left else 0)


if __name__ == "__main__":
    main()
