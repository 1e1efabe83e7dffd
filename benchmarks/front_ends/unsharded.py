"""torchrun unsharded.py (-m MODULE | SCRIPT) [arguments]: a front end's own run, in DDP and without DeepSpeed.

What every run with DeepSpeed must equal: same processes, batches and losses, but each process has whole gradients, and
the optimizer sees whole matrices. UNSHARDED=AdamW trains with torch's AdamW in place of ours, to show how far apart
the two are.
"""

from __future__ import annotations

import os
import runpy
import sys

import torch
import torch.distributed as dist
import transformers

import ds_moelora

# DDP frees its process group with Python's lock held, for which gloo's threads wait: it hangs now and then where the
# front end closed the group before (https://github.com/pytorch/pytorch/issues/56297). So the group is kept, and the
# process ends without destructors.
kept: list[dist.ProcessGroup] = []


def create_optimizer(trainer: transformers.Trainer, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
    """In place of the Trainer's: all trained parameters in one group, as the DeepSpeed engine has them."""
    if trainer.optimizer is None:
        args = trainer.args
        kept.append(dist.group.WORLD)
        optimizer = getattr(torch.optim, os.environ.get("UNSHARDED", "GateRiemannianAdamW"))
        ds_moelora.tag_lora_pairs(trainer.model)
        trainer.optimizer = optimizer(
            [p for p in trainer.model.parameters() if p.requires_grad],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
    return trainer.optimizer


def run() -> None:
    """Runs what the command line names, as if it were started itself."""
    if sys.argv[1] == "-m":
        name, sys.argv = sys.argv[2], sys.argv[2:]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    transformers.Trainer.create_optimizer = create_optimizer
    run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
