"""python lightning_fit.py STAGE lora|moe OUT: Lightning's DeepSpeedStrategy; the config has the optimizer."""

from __future__ import annotations

import sys

import lightning
import torch
from assets import loop_config
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny import BATCH, model, tokens
from torch.utils.data import DataLoader

PROCESSES = 2


class Tuned(lightning.LightningModule):
    """A language model whose loss is the model's own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = model(kind)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> None:
        return None  # the optimizer block of the DeepSpeed config

    def train_dataloader(self) -> DataLoader:
        return DataLoader(tokens()[self.trainer.global_rank :: PROCESSES], batch_size=BATCH // PROCESSES)


def allow_cpus() -> None:
    """Lightning refuses DeepSpeed without GPUs; for this comparison alone it must not."""
    import deepspeed
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import deepspeed as strategy

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as cpu/sitecustomize.py
    strategy.CUDAAccelerator = CPUAccelerator
    strategy._validate_device_index_selection = lambda devices: None
    plain = deepspeed.initialize

    def initialize(*args, **kwargs):
        kwargs["args"].device_rank = 0  # Lightning passes the index of a GPU
        return plain(*args, **kwargs)

    deepspeed.initialize = initialize


if __name__ == "__main__":
    stage, kind, out = int(sys.argv[1]), *sys.argv[2:4]
    options = {}
    if not torch.cuda.is_available():
        allow_cpus()
        options = {"process_group_backend": "gloo"}
    config = loop_config(stage, BATCH // PROCESSES)
    del config["gradient_accumulation_steps"], config["gradient_clipping"]  # Lightning sets these
    trainer = lightning.Trainer(
        strategy=DeepSpeedStrategy(config=config, **options),
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=PROCESSES,
        max_epochs=1,
        use_distributed_sampler=False,  # it would shuffle
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    tuned = Tuned(kind)
    trainer.fit(tuned)
    if trainer.is_global_zero:
        tuned.model.save_pretrained(out)
