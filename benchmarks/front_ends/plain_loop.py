"""python plain_loop.py lora|moe OUT [OPTIMIZER]: one process, plain PyTorch. What the loops must equal."""

from __future__ import annotations

import sys

import torch
from assets import OURS
from tiny import BATCH, OPTIONS, model, tokens, trained

import ds_moelora

if __name__ == "__main__":
    kind, out, name = [*sys.argv[1:], OURS][:3]
    net = model(kind)
    ds_moelora.tag_lora_pairs(net)  # an optimizer that the user makes: nobody else does it
    optimizer = getattr(torch.optim, name)(trained(net), **OPTIONS)
    for batch in tokens().split(BATCH):
        net(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    net.save_pretrained(out)
