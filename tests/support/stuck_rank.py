"""One of three ranks of which one gets stuck: STUCK=<kind>:<rank>. No model: groups made as DeepSpeed makes them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
import torch.distributed as dist

from launch.checks.errors import run_guarded
from launch.checks.extensions import skip_inference_collectives
from launch.cluster import watchdog

SECONDS = 9  # --ddp_timeout, longer than the silence that is noticed; the start has another, for slow machines


def get_stuck(kind: str) -> None:
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # for ever


def main() -> None:
    kind, stuck = os.environ["STUCK"].split(":")
    skip_inference_collectives()
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=300))
    watch = watchdog.start(30.0)
    watchdog.limit_groups(timedelta(seconds=SECONDS))
    group = deepspeed.comm.new_group(ranks=range(dist.get_world_size()))
    for step in range(1, 5):
        dist.barrier()  # the start's limit: all are here
        if step == 4 and os.environ["RANK"] == stuck:
            print("stuck", flush=True)
            get_stuck(kind)
        deepspeed.comm.all_reduce(torch.ones(3), group=group)
        watch.reached(f"step {step}")


if __name__ == "__main__":
    run_guarded(main, debug=False)
