"""Saving and resuming through the engine: the resumed run equals the uninterrupted one."""

from __future__ import annotations

import functools
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moelora import check_data_only

from ..support.mixture import SHAPES, Stack, batches
from ..support.plain_lora import plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import SHARDED, deviation, engine_config, full_weights, loraplus_groups, one_group

pytestmark = pytest.mark.dist

MODELS: dict[str, Callable[..., nn.Module]] = {
    "moe": lambda: Stack(SHAPES),
    "lora": plain_lora,
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
    save_folder: str | None = None,
    model: str = "moe",
    groups: str = "one",
) -> dict[str, Any]:
    """On every rank: steps [start, stop) on data made for `data_ranks` ranks, whatever the world size.

    A rank takes several ranks' batches as one, so that every topology sees the same global batch.
    """
    import deepspeed

    import ds_moelora

    module = MODELS[model]()
    if load:
        # What was trained must come from the checkpoint. (DeepSpeed's universal checkpoints leave the frozen base out.)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5 if p.requires_grad else 1.0)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=GROUPS[groups](module), config=config)
    if load:
        with ds_moelora.data_only():  # nothing more is needed, and nothing more is loaded
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
        engine.save_checkpoint(save_folder or folder)
    weights = full_weights(engine.module)
    engine.destroy()
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize(
    ("kind", "stage", "model", "groups"),
    [
        *(("GateRiemannianAdamW", stage, "moe", "one") for stage in (0, 1, 2, 3)),
        *((kind, stage, "moe", "one") for kind in SHARDED[1:] for stage in (1, 3)),
        *(("GateRiemannianAdamW", stage, "moe", "loraplus") for stage in (2, 3)),
        *(("GateRiemannianSGD", stage, "lora", "one") for stage in (0, 2, 3)),
    ],
)
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


def convert_to_universal(folder: Path) -> None:
    """As `python -m deepspeed.checkpoint.ds_to_universal` does, for the newest checkpoint in `folder`."""
    from deepspeed.checkpoint.ds_to_universal import main

    tag = (folder / "latest").read_text().strip()
    options = {
        "input_folder": str(folder / tag),
        "output_folder": str(folder / f"{tag}_universal"),
        "num_extract_workers": 1,
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,
    }
    main(Namespace(**options))
    (folder / "latest_universal").write_text(f"{tag}_universal")


def universal(stage: int, kind: str) -> dict[str, Any]:
    return {**engine_config(stage, kind), "checkpoint": {"load_universal": True}}


def test_universal_checkpoint_changes_topology(tmp_path: Path, report: Callable[[str, str], None]) -> None:
    """2 ranks at stage 1 -> 4 ranks at stage 2 -> 1 rank at stages 1 and 2, against the uninterrupted 2-rank run."""
    kind, run = "GateRiemannianAdamW", functools.partial(run_on_ranks, function=train, data_ranks=4)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    whole = run(2, config=engine_config(1, kind), start=0, stop=9, folder=a)[0]
    first = run(2, config=engine_config(1, kind), start=0, stop=3, folder=a, save=True)[0]
    convert_to_universal(tmp_path / "a")
    second = run(4, config=universal(2, kind), start=3, stop=6, folder=a, load=True, save=True, save_folder=b)[0]
    convert_to_universal(tmp_path / "b")
    for stage in (1, 2):
        third = run(1, config=universal(stage, kind), start=6, stop=9, folder=b, load=True)[0]
        losses = first["losses"] + second["losses"] + third["losses"]
        found = max(abs(x - y) / abs(y) for x, y in zip(losses, whole["losses"], strict=True))
        found = max(found, deviation(third["weights"], whole["weights"]))
        report(
            "Universal checkpoints: 2 ranks stage 1 -> 4 ranks stage 2 -> 1 rank (losses and weights, relative)",
            f"{kind} last stage {stage}: {found:.1e}",
        )
        assert found < 1e-5


@pytest.mark.parametrize("kind", ["AdamW", "GateRiemannianAdamW"])
@pytest.mark.parametrize(
    ("stage", "message"), [(0, "'NoneType' object has no attribute 'copy'"), (3, "len(self.ckpt_list) > 0")]
)
def test_universal_checkpoints_that_deepspeed_cannot_load(kind: str, stage: int, message: str, tmp_path: Path) -> None:
    """DeepSpeed's limits, not ours: plain AdamW fails in the same way (docs/optimizer.md lists them)."""
    run = functools.partial(run_on_ranks, function=train, data_ranks=2, folder=str(tmp_path))
    run(2, config=engine_config(1, kind), start=0, stop=1, save=True)
    convert_to_universal(tmp_path)
    with pytest.raises(AssertionError) as error:
        run(1, config=universal(stage, kind), start=1, stop=2, load=True)
    assert message in str(error.value)


def test_universal_conversion_wants_adam_states(tmp_path: Path) -> None:
    """DeepSpeed's converter reads `exp_avg`: SGD of any kind cannot be converted."""
    run_on_ranks(
        2,
        train,
        config=engine_config(1, "GateRiemannianSGD"),
        start=0,
        stop=1,
        folder=str(tmp_path),
        data_ranks=2,
        save=True,
    )
    with pytest.raises(KeyError, match="exp_avg"):
        convert_to_universal(tmp_path)


def damage(folder: Path, how: str) -> str:
    """Damages the newest checkpoint as a killed or interrupted save leaves it; returns the file's name."""
    tag = (folder / "latest").read_text().strip()
    victim = sorted((folder / tag).glob("*optim_states.pt"))[-1]
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim.name


@pytest.mark.parametrize(("stage", "how"), [(1, "missing"), (3, "truncated")])
def test_a_damaged_checkpoint_never_loads_as_if_whole(stage: int, how: str, tmp_path: Path) -> None:
    """The error names the file, and the checkpoint before it still loads."""
    config = engine_config(stage, "GateRiemannianAdamW")
    run = functools.partial(run_on_ranks, 2, train, config=config, folder=str(tmp_path), data_ranks=2)
    run(start=0, stop=2, save=True)
    (tmp_path / "latest").rename(tmp_path / "older")
    whole = run(start=0, stop=4, save=True)
    check_data_only(tmp_path)
    name = damage(tmp_path, how)
    with pytest.raises(AssertionError) as error:
        run(start=4, stop=5, load=True)
    if how == "missing":  # DeepSpeed says so itself; of a truncated file it only says that something is
        assert name in str(error.value)
    else:
        with pytest.raises(ValueError, match=name):
            check_data_only(tmp_path)
    (tmp_path / "older").rename(tmp_path / "latest")
    resumed = run(start=2, stop=4, load=True)
    assert resumed[0]["losses"] == whole[0]["losses"][2:]


def killed_while_saving(config: dict[str, Any], folder: str) -> None:
    """On every rank: two steps, a checkpoint, a third step; rank 1 is killed half-way through the next checkpoint."""
    import deepspeed

    import ds_moelora  # noqa: F401

    module = MODELS["moe"]()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=one_group(module), config=config)
    for step, micro in enumerate(batches(3, 1, 2)):
        engine.backward(engine(*micro[0][dist.get_rank()]))
        engine.step()
        if step == 1:
            engine.save_checkpoint(folder)
    save = torch.save

    def cut_short(state: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(state, path, *args, **kwargs)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        torch.save = cut_short
    engine.save_checkpoint(folder)


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_while_saving(stage: int, tmp_path: Path) -> None:
    """The interrupted checkpoint is recognised, though DeepSpeed's `latest` names it; the one before it resumes.

    Rank 0 writes `latest` without waiting for the files of the other ranks.
    """
    config = engine_config(stage, "GateRiemannianAdamW")
    run = functools.partial(run_on_ranks, 2, train, config=config, folder=str(tmp_path), data_ranks=2)
    whole = run(start=0, stop=4)
    with pytest.raises(AssertionError, match="the process died"):
        run_on_ranks(2, killed_while_saving, config=config, folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"rank_1.*_states\.pt is incomplete.*checkpoint before it"):
        check_data_only(tmp_path)
    check_data_only(tmp_path / "global_step2")
    (tmp_path / "latest").write_text("global_step2")
    assert run(start=2, stop=4, load=True)[0]["losses"] == whole[0]["losses"][2:]
