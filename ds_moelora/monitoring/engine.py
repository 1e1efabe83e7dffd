"""TensorBoard (and DeepSpeed's other monitors) for your own training loop."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .heat_map import write_heat_map
from .meter import TrainingMeter
from .run_info import write_run_info


class EngineMonitor:
    """Writes what a mixture and its optimizer do where the engine's DeepSpeed config says (`tensorboard` block).

        monitor = EngineMonitor(engine, every=10)
        for batch in batches:
            engine.backward(engine(**batch).loss)
            engine.step()
            monitor.step()

    The same scalars, heat map, hyperparameters and text as `MoELoRACallback`; images and text need the `tensorboard`
    block, scalars go to every monitor (`MonitorMaster.write_events`). The horizontal axis counts optimizer steps.

    Args:
        engine: what `deepspeed.initialize` returned. Every rank makes a monitor and calls it.
        every: steps from one report to the next; the first step is reported as well.
        heat_map_every: reports from one heat map to the next; 0: none.

    Raises:
        ValueError: no monitor is switched on in the engine's config, or a number is out of range.
    """

    def __init__(self, engine: Any, every: int = 10, heat_map_every: int = 5) -> None:
        for name, value, least in (("every", every, 1), ("heat_map_every", heat_map_every, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if not engine.monitor.enabled:
            raise ValueError(
                "this engine's DeepSpeed config has no monitor switched on; add "
                '"tensorboard": {"enabled": true, "output_path": "runs", "job_name": "mixture"} to it (or csv_monitor, '
                "wandb, comet)."
            )
        self.engine, self.every, self.heat_map_every = engine, every, heat_map_every
        self.meter = TrainingMeter(engine.module, engine)
        self._first = self._done = engine.global_steps
        # For images and text; only rank 0 has one, and only with a `tensorboard` block.
        self._writer = getattr(engine.monitor.tb_monitor, "summary_writer", None)
        if self._writer is not None:
            extra = {
                "train_batch_size": engine.train_batch_size(),
                "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
                "world_size": dist.get_world_size(),
            }
            write_run_info(self._writer, engine.module, engine, engine, extra)
        self._arm_if_due()

    def step(self) -> None:
        """After every `engine.step()`, on every rank; micro-batches that complete no step are not counted."""
        if self.engine.global_steps == self._done:
            return
        self._done = self.engine.global_steps
        report = self.meter.step_done()
        if report is not None:
            self.engine.monitor.write_events([(tag, value, self._done) for tag, value in report.scalars.items()])
            if self._writer is not None:
                write_heat_map(self._writer, report, self._done, self.heat_map_every)
        self._arm_if_due()

    def pause(self) -> None:
        """What has passed since the last step (an evaluation, a checkpoint) is left out of the times."""
        self.meter.restart_clock()

    def close(self) -> None:
        """Leaves model and optimizer as they were before."""
        self.meter.close()

    def _arm_if_due(self) -> None:
        if self._done == self._first or (self._done + 1) % self.every == 0:
            self.meter.arm()
