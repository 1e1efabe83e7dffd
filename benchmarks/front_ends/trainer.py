"""torchrun trainer.py lora|moe [TrainingArguments' flags]: a script of one's own on transformers' Trainer."""

from __future__ import annotations

import sys

from tiny import model, tokens
from transformers import HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    kind, *flags = sys.argv[1:]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = Trainer(model=model(kind), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model(args.output_dir)
