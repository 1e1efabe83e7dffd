"""Saving and resuming through the engine: the resumed run equals the uninterrupted one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..support.mixture import SHAPES, Stack, batches
from ..support.plain_lora import plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import (
    SHARDED,
    deviation,
    engine_config,
    full_weights,
    loraplus_groups,
    one_group,
)

pytestmark = pytest.mark.dist

MODELS: dict[str, Callable[..., nn.Module]] = {
    "moe": functools.partial(Stack, SHAPES),
    "lora": lambda seed=0: plain_lora(),
}
GROUPS = {"one": one_group, "loraplus": loraplus_groups}


def train(
    config: dict[str, Any],
    start: int,
    stop: int,
    folder: str,
    data_ranks: int,
    load: bool = False,
    save: bool = False,
    model: str = "moe",
    groups: str = "one",
) -> dict[str, Any]:
    """On every rank: steps [start, stop) on data made for `data_ranks` ranks, whatever the world size.

    A rank takes several ranks' batches as one, so that every topology sees the same global batch.
    """
    import deepspeed

    import ds_moelora  # noqa: F401

    # Whatever is to be restored must come from the checkpoint, not from the seed.
    module = MODELS[model](seed=99) if load else MODELS[model]()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=GROUPS[groups](module), config=config)
    if load:
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
    share = data_ranks // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    losses = []
    for micro in batches(stop, 1, data_ranks)[start:]:
        x, target = (torch.cat(tensors) for tensors in zip(*micro[0][mine], strict=True))
        loss = engine(x, target)
        engine.backward(loss)
        engine.step()
        mean: Tensor = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    if save:
        engine.save_checkpoint(folder)
    weights = full_weights(engine.module)
    engine.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize(("model", "groups"), [("moe", "one"), ("moe", "loraplus"), ("lora", "one")])
def test_same_topology_is_bit_equal(kind: str, stage: int, model: str, groups: str, tmp_path: Path) -> None:
    config = engine_config(stage, kind)
    run = functools.partial(
        run_on_ranks, 2, train, config=config, folder=str(tmp_path), data_ranks=2, model=model, groups=groups
    )
    whole = run(start=0, stop=6)
    first = run(start=0, stop=3, save=True)
    second = run(start=3, stop=6, load=True)
    for rank in range(2):
        assert first[rank]["losses"] + second[rank]["losses"] == whole[rank]["losses"]
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(second[rank]["weights"][name], weight), name


def to_universal(source: Path, target: Path) -> None:
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


@pytest.mark.parametrize("kind", SHARDED)
def test_universal_checkpoint_changes_topology(kind: str, tmp_path: Path, report: Callable[[str, str], None]) -> None:
    """2 ranks at stage 1 -> 4 ranks at stage 2 -> 1 rank at stages 0 to 2, against the uninterrupted 2-rank run."""
    whole = run_on_ranks(
        2, train, config=engine_config(1, kind), start=0, stop=9, folder=str(tmp_path / "unused"), data_ranks=4
    )[0]
    losses = run_on_ranks(
        2, train, config=engine_config(1, kind), start=0, stop=3, folder=str(tmp_path / "a"), data_ranks=4, save=True
    )[0]["losses"]
    convert(tmp_path / "a")
    config = {**engine_config(2, kind), "checkpoint": {"load_universal": True}}
    losses += run_on_ranks(
        4, train, config=config, start=3, stop=6, folder=str(tmp_path / "a"), data_ranks=4, load=True, save=True
    )[0]["losses"]
    for stage in (0, 1, 2, 3):
        config = {**engine_config(stage, kind), "checkpoint": {"load_universal": True}}
        try:
            last = run_on_ranks(1, train, config=config, start=6, stop=9, folder=str(tmp_path / "a"), data_ranks=4, load=True)[0]
        except AssertionError as error:
            report("u", f"{kind} stage {stage} failed {str(error)[-300:]}")
            continue
        report("u", f"{kind} {stage} {losses + last['losses']} {whole['losses']} {deviation(last['weights'], whole['weights'])}")


def convert(folder: Path) -> None:
    tag = (folder / "latest").read_text().strip()
    to_universal(folder / tag, folder / f"{tag}_universal")
    (folder / "latest_universal").write_text(f"{tag}_universal")
