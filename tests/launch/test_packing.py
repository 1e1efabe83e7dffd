"""A pack trains what its rows would alone: the same loss, the routers' part of it included, and no leak."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset

from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.effects import check_effects
from launch.checks.errors import UserError
from launch.training import modeling, trainers
from launch.training.preparation import PROBE_TOLERANCE, PackingGuard, packed_leak
from launch.training.processors import processor_of_run
from tests.support.launch_support import tiny_model

# Among them text without a prompt, whose first token has a label that nothing predicts.
ROWS = [{"prompt": "a" * (3 * n % 7), "completion": "b" * (n % 5 + 1)} for n in range(9)]
# fp32 sums over some hundred terms in another order.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def build(folder: Path, tmp_path: Path) -> Iterator[Any]:
    def trainer(*flags: str) -> Any:
        arguments = parse(folder, "--output_dir", str(tmp_path / "out"), *flags)
        arguments.training.start()
        tokenizer = processor_of_run(arguments)
        torch.manual_seed(0)
        model = modeling.load_model(arguments, modeling.adapter_config(arguments.adapter, "causal-lm"), {}, tokenizer)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.5)
        return trainers.build_trainer(arguments, model, tokenizer, Dataset.from_list(ROWS), None, [])

    yield trainer
    AcceleratorState._reset_state(reset_partial_state=True)


def parse(folder: Path, *flags: str) -> Arguments:
    return parse_arguments(
        ["--model_name_or_path", str(folder), "--dataset_name", "d", "--optim", "adamw_torch", "--report_to", "none",
         "--r", "2", "--num_experts", "4", "--router_aux_loss_coef", "0.7", "--router_z_loss_coef", "0.3",
         "--gradient_checkpointing", "false", *flags], {}
    )  # fmt: skip


def loss_of_all(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss over all rows in one optimizer step, and its gradients."""
    trainer.model.train()
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    num_items = trainer._get_num_items_in_batch(batches, "cpu")
    loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items) for batch in batches)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("length", ["24", "200"])
def test_a_pack_has_the_loss_and_gradients_of_its_rows(build: Any, length: str) -> None:
    alone = loss_of_all(build())
    trainer = build("--packing", "--max_length", length)
    assert len(trainer.train_dataset) < len(ROWS)
    packed = loss_of_all(trainer)
    assert torch.allclose(packed[0], alone[0], rtol=TOLERANCE)
    assert packed[1].keys() == alone[1].keys()
    for name, gradient in alone[1].items():
        error = (packed[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 10 * TOLERANCE, name


def test_the_guard_finds_rows_that_see_each_other(build: Any) -> None:
    trainer = build("--packing", "--max_length", "64")
    guard = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PackingGuard))
    assert packed_leak(trainer) == 0.0
    guard.on_train_begin(trainer.args, trainer.state, trainer.control)
    collate = trainer.data_collator

    def without_boundaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    trainer.data_collator = without_boundaries
    assert packed_leak(trainer) > 10 * PROBE_TOLERANCE
    with pytest.raises(UserError, match="--packing: in this model"):
        guard.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_packing_that_mixes_rows_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--packing_strategy wrapped cuts rows anywhere"):
        check_effects(parse(folder, "--packing", "--packing_strategy", "wrapped"))
