"""What every process of the tests imports, imported once: `tests.support.forks` forks the others from one that has.

Importing all of it takes 10 s of a core. Nothing here may start a thread, make a tensor or open a process group.
"""

import gc
from contextlib import suppress

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import torch
import transformers  # noqa: F401
from matplotlib import figure  # noqa: F401
from matplotlib.backends import backend_agg  # noqa: F401
from torch.utils import tensorboard  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import ds_moelora  # noqa: F401
import launch.train  # noqa: F401
from launch.checks.extensions import skip_inference_collectives

with suppress(ImportError):  # DeepSpeed >= 0.18 imports it with the first engine, and with it torch._inductor: 1.2 s
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
torch.set_num_threads(1)
skip_inference_collectives()  # no minute of GCC in whichever test comes first
# DeepSpeed collects garbage many times while it builds an engine. What has been imported is no garbage: without a look
# at it a rank builds and ends a small stage-3 engine in 0.3 s of a core instead of 0.5 s.
gc.collect()
gc.freeze()
