"""What processes of a DeepSpeed run need on a machine without GPUs; Python imports it at its start.

- DeepSpeed would compile collectives for CPUs, minutes per environment; without them it uses gloo's.
- ZeRO-3 shards while the model is loaded, by DeepSpeed's process group; for CPUs accelerate opens torch's alone.
"""

import os

if "LOCAL_RANK" in os.environ and "FRONT_ENDS_STAGE" in os.environ:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ["FRONT_ENDS_STAGE"] == "3":
        deepspeed.init_distributed()
