"""torchrun deepspeed_loop.py STAGE lora|moe OUT: DeepSpeed's own loop, with a checkpoint saved and loaded half-way."""

from __future__ import annotations

import sys

import deepspeed
import torch.distributed as dist
from assets import loop_config
from tiny import BATCH, model, tokens, trained

if __name__ == "__main__":
    stage, kind, out = int(sys.argv[1]), *sys.argv[2:4]
    deepspeed.init_distributed()
    rank, processes = dist.get_rank(), dist.get_world_size()
    net = model(kind)
    config = loop_config(stage, BATCH // processes)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=trained(net), config=config)
    for step, batch in enumerate(tokens().split(BATCH)):
        if step == 2:
            engine.save_checkpoint(f"{out}/checkpoint")
            engine.load_checkpoint(f"{out}/checkpoint")
        batch = batch[rank::processes]
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(trained(net), enabled=stage == 3):
        if rank == 0:
            engine.module.save_pretrained(out)
