"""What processes of a run on two CPU processes need on a machine without GPUs; Python imports it at its start.

- Gloo's threads abort a process now and then that ends with its process group open (https://github.com/pytorch/pytorch/
  pull/179291), as the front ends do. They get a moment to release what they hold, and the group is closed.
- DeepSpeed would compile collectives for CPUs, minutes per environment; without them it uses gloo's.
- ZeRO-3 shards while the model is loaded, by DeepSpeed's process group; for CPUs accelerate opens torch's alone.
"""

import atexit
import os
import sys
import time


def close_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        time.sleep(0.5)
        distributed.destroy_process_group()


if "LOCAL_RANK" in os.environ:
    atexit.register(close_process_group)
    if "FRONT_ENDS_STAGE" in os.environ:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if os.environ["FRONT_ENDS_STAGE"] == "3":
            deepspeed.init_distributed()
