"""Runs the launcher several times in one process: imports and torch.distributed's start are paid once.

    deepspeed --num_gpus 1 tests/support/several_runs.py RUNS.json       # a list of lists of arguments

Writes `RUNS.json.done`: per run null, or the traceback of what ended it.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState

from launch import train

if __name__ == "__main__":
    # DeepSpeed remembers the groups of the first run.
    train.dist.destroy_process_group = lambda: None
    path, outcomes = Path(sys.argv[-1]), []
    for arguments in json.loads(path.read_text()):
        try:
            train.main(arguments)
            outcomes.append(None)
        except Exception:
            outcomes.append(traceback.format_exc())
        AcceleratorState._reset_state(reset_partial_state=True)
    path.with_suffix(".json.done").write_text(json.dumps(outcomes))
