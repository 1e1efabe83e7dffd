"""Prints, on every rank, where it is and with whom it shares experts, for ep_size 2 in both orders of DeepSpeed."""

from __future__ import annotations

import os
import socket
import sys

import deepspeed
import torch.distributed as dist

from ds_moelora.expert_parallel.groups import create_groups, expert_parallel_group
from launch.checks.errors import adopt_rank
from launch.checks.extensions import skip_inference_collectives

adopt_rank()
skip_inference_collectives()
deepspeed.init_distributed(verbose=False)
data_before_expert = "--data_before_expert" in sys.argv
create_groups(2, data_before_expert)
members = dist.get_process_group_ranks(expert_parallel_group("ep_size_2"))
print(f"rank {dist.get_rank()} {socket.gethostname()} {os.environ['LOCAL_RANK']} {members}", flush=True)
dist.barrier()
dist.destroy_process_group()
