"""What DeepSpeed itself gets wrong in some of the versions that the tests run with; plain AdamW shows each fault too.

Seen on 0.16.9, 0.17.6 and 0.19.8; where a fault begins or ends between these was not looked for. The last is a fault
of transformers', with any adapter.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.version import Version

DEEPSPEED = Version(metadata.version("deepspeed"))
# A module that PEFT copied (modules_to_save): the first forward pass of it fails.
STAGE_3_LOSES_WRAPPED_MODULES = Version("0.18") > DEEPSPEED
STAGE_3_ERROR = "'Linear' object has no attribute 'ds_grads_remaining'"
# fp16 with offload and fp32 accumulation: an overflow stays in the buffers, and every later step is skipped.
OVERFLOW_STAYS = Version("0.19") <= DEEPSPEED
# Not one step at stages 1 and 2 on more than one CPU rank with torch 2.13.
GATHER_FAILS = Version("0.18") <= DEEPSPEED < Version("0.19")
GATHER_ERROR = "Output 0 of Split is a view and is being modified inplace"

# Why AutoModel.from_pretrained and load_adapter cannot load an adapter; "" if they can.
TRANSFORMERS_LOADS_NO_ADAPTER = (
    ""
    if Version(metadata.version("peft")) >= Version("0.19")
    or Version(metadata.version("transformers")) < Version("5.6")
    else "this transformers imports a function of PEFT's that PEFT 0.18 lacks, for an adapter of any type"
)


def wrong_gradients(case: dict[str, Any]) -> str | None:
    """Why the raw gradients of a case of `test_settings.py` are not the model's in this version of DeepSpeed."""
    if case["stage"] not in (1, 2) or Version("0.18") <= DEEPSPEED:
        return None
    if case["model"] == "shared" and not case["contiguous_gradients"]:
        return "a parameter used twice in forward, without contiguous_gradients"
    if Version("0.17") <= DEEPSPEED and case["stage"] == 2 and case["world"] == 1 and case["accumulate"] > 1:
        return "gradient accumulation in one process"
    return None
