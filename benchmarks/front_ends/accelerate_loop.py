"""accelerate launch accelerate_loop.py lora|moe OUT: a loop of one's own; the config has the optimizer."""

from __future__ import annotations

import sys

from accelerate import Accelerator
from accelerate.utils import DummyOptim
from tiny import BATCH, OPTIONS, model, tokens, trained
from torch.utils.data import DataLoader

if __name__ == "__main__":
    kind, out = sys.argv[1:3]
    accelerator = Accelerator()
    net = model(kind)
    loader = DataLoader(tokens(), batch_size=BATCH // accelerator.num_processes)
    net, optimizer, loader = accelerator.prepare(net, DummyOptim(trained(net), lr=OPTIONS["lr"]), loader)
    for batch in loader:
        accelerator.backward(net(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(net)
    if accelerator.is_main_process:
        accelerator.unwrap_model(net).save_pretrained(out, state_dict=state)
