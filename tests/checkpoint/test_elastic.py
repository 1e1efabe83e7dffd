"""Elastic checkpoints: a run goes on in another topology as if nothing had happened."""

from __future__ import annotations

import copy
import json
import math
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import ds_moelora
from ds_moelora.checkpoint.elastic import topology_changes
from ds_moelora.checkpoint.elastic_folder import read_manifest

from ..support.expert_parallel import adapted, batches, whole_weights
from ..support.ranks import close_pool, run_on_ranks
from ..support.training import accelerator_answers, deviation, engine_config, full_weights

pytestmark = pytest.mark.dist

MICRO_BATCHES = 8  # of all ranks together in one step, whatever their number
STEPS = 9
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 6}}


@pytest.fixture(scope="module", autouse=True)
def eight_ranks_only_here() -> Iterator[None]:
    yield
    close_pool(8)


def train(
    stage: int,
    ep_size: int,
    kind: str,
    first: int,
    last: int,
    load: str | None = None,
    save: str | None = None,
    precision: str = "fp32",
    **model: Any,
) -> dict[str, Any]:
    """On every rank: steps first..last of the one run; mean loss of every step, learning rates, whole weights."""
    import deepspeed

    world = dist.get_world_size()
    config = engine_config(stage, kind, clip=1.0, accumulate=MICRO_BATCHES // world, precision=precision)
    config["scheduler"] = copy.deepcopy(WARMUP)
    module = adapted(ep_size, **model)
    trained = [p for p in module.parameters() if p.requires_grad]
    if load:  # what was trained must come from the checkpoint
        with torch.no_grad():
            for p in trained:
                p.mul_(1.5)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    result: dict[str, Any] = {"losses": [], "lr": [], "changes": None}
    if load:
        result["changes"] = topology_changes(engine, load)
        ds_moelora.load_elastic(engine, load)
        assert engine.global_steps == first
    dtype = next(engine.module.parameters()).dtype
    for micro_batches in batches(last, MICRO_BATCHES // world, world)[first:]:
        losses = []
        for by_rank in micro_batches:
            x, target = by_rank[dist.get_rank()]
            loss = engine(x.to(dtype), target.to(dtype))["loss"]
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / world)
        result["losses"].append(sum(losses) / len(losses))
        result["lr"].append(engine.get_lr()[0])
    if save:
        ds_moelora.save_elastic(engine, save)
    result["weights"] = full_weights(engine.module) if stage == 3 else whole_weights(engine.module)
    engine.destroy()
    return result


def uninterrupted(kind: str) -> dict[str, Any]:
    if kind not in _uninterrupted:
        _uninterrupted[kind] = run_on_ranks(1, train, stage=0, ep_size=1, kind=kind, first=0, last=STEPS)[0]
    return _uninterrupted[kind]


_uninterrupted: dict[str, dict[str, Any]] = {}

# (ranks, ep_size, ZeRO stage), one after the other
CHAINS = {
    "8-2-4 ranks, stages 1-2-3": [(8, 2, 1), (2, 1, 2), (4, 1, 3)],
    "ep 2-4-1, stages 1-2-3": [(4, 2, 1), (4, 4, 2), (2, 1, 3)],
    "stages 3-0-2": [(2, 1, 3), (2, 2, 0), (4, 2, 2)],
}


@pytest.mark.parametrize("kind", ["GateRiemannianAdamW", "GateRiemannianSGD", "AdamW"])
@pytest.mark.parametrize("chain", list(CHAINS))
def test_goes_on_in_other_topologies(chain: str, kind: str, tmp_path: Path, record_property: Any) -> None:
    whole = uninterrupted(kind)
    losses: list[float] = []
    rates: list[float] = []
    load = None
    for leg, (world, ep_size, stage) in enumerate(CHAINS[chain]):
        save = str(tmp_path / f"leg{leg}")
        first, last = leg * STEPS // 3, (leg + 1) * STEPS // 3
        options = {"stage": stage, "ep_size": ep_size, "kind": kind, "first": first, "last": last}
        result = run_on_ranks(world, train, load=load, save=save, **options)[0]
        assert (result["changes"] is None) == (leg == 0)
        assert leg == 0 or result["changes"]
        losses += result["losses"]
        rates += result["lr"]
        load = save
    loss_error = max(abs(a - b) / abs(b) for a, b in zip(losses, whole["losses"], strict=True))
    weight_error = deviation(result["weights"], whole["weights"])
    record_property("deviation", f"{chain} {kind}: losses {loss_error:.1e}, weights {weight_error:.1e}")
    print(f"{chain:28} {kind:20} losses {loss_error:.1e} weights {weight_error:.1e}")
    assert rates == pytest.approx(whole["lr"], rel=1e-12)
    assert loss_error < 1e-5
    assert weight_error < 1e-5


def resave(config: dict[str, Any], ep_size: int, load: str, save: str) -> None:
    """On every rank: a fresh engine takes a checkpoint over and writes it again."""
    import deepspeed

    module = adapted(ep_size)
    with accelerator_answers(fp16=True):  # whatever the CPU
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=[p for p in module.parameters() if p.requires_grad], config=config
        )
    ds_moelora.load_elastic(engine, load)
    ds_moelora.save_elastic(engine, save)
    engine.destroy()


def offloaded(stage: int) -> dict[str, Any]:
    config = engine_config(stage, "GateRiemannianAdamW", offload_optimizer={"device": "cpu"})
    return {**config, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}


ARRANGEMENTS = {
    "stage 0, ep 2": (2, 2, engine_config(0, "GateRiemannianAdamW")),
    "stage 1, round robin, ep 2": (
        2,
        2,
        engine_config(1, "GateRiemannianAdamW", round_robin_gradients=True, overlap_comm=False),
    ),
    "stage 2, offload": (2, 1, offloaded(2)),
    "stage 3, sub-groups of 50": (4, 1, engine_config(3, "GateRiemannianAdamW", sub_group_size=50)),
    "stage 3, offload": (2, 1, offloaded(3)),
    "stage 3, kept whole": (
        2,
        1,
        engine_config(3, "GateRiemannianAdamW", stage3_param_persistence_threshold=10**6),
    ),
    "stage 0, bf16": (2, 1, engine_config(0, "GateRiemannianAdamW", precision="bf16")),
    "stage 1, bf16": (2, 2, engine_config(1, "GateRiemannianAdamW", precision="bf16")),
    "stage 1, bf16, fp32 accumulation": (
        2,
        1,
        {**engine_config(1, "GateRiemannianAdamW", precision="bf16"), "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "stage 2, fp16": (2, 1, engine_config(2, "GateRiemannianAdamW", precision="fp16")),
    "stage 3, bf16": (2, 1, engine_config(3, "GateRiemannianAdamW", precision="bf16")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on four ranks."""
    folder = tmp_path_factory.mktemp("elastic") / "saved"
    options = {"stage": 2, "ep_size": 4, "kind": "GateRiemannianAdamW", "first": 0, "last": 3}
    run_on_ranks(4, train, save=str(folder), **options)
    return folder


@pytest.mark.parametrize("name", list(ARRANGEMENTS))
def test_nothing_changes_on_the_way(name: str, trained: Path, tmp_path: Path) -> None:
    """Whatever holds the parameters takes weights, states and counters over to the bit, and gives them back."""
    world, ep_size, config = ARRANGEMENTS[name]
    config = {**config, "scheduler": copy.deepcopy(WARMUP)}
    run_on_ranks(world, resave, config=config, ep_size=ep_size, load=str(trained), save=str(tmp_path / "again"))
    before, after = read_manifest(trained), read_manifest(tmp_path / "again")
    assert before["parameters"] == after["parameters"]
    assert before["run"]["counters"] == after["run"]["counters"]
    assert before["run"]["scheduler"] == after["run"]["scheduler"]
    for file in before["files"]:
        old, new = load_file(trained / file), load_file(tmp_path / "again" / file)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old), file


def refused(damage: str, folder: str) -> tuple[str, bool]:
    """On every rank: the error's text, and whether the weights are still as they were."""
    import deepspeed

    kind = "AdamW" if damage == "optimizer" else "GateRiemannianAdamW"
    module = adapted(r=2) if damage == "rank" else adapted()
    if damage == "frozen":
        for p in module.base_model.model.second.parameters():
            p.requires_grad_(False)
    params = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=params, config=engine_config(1, kind))
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r".") as caught:
        ds_moelora.load_elastic(engine, folder)
    same = all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    engine.destroy()
    return str(caught.value), same


DAMAGE = {
    "truncated": "00001.safetensors is incomplete",
    "missing": "00001.safetensors is incomplete: 0 of",
    "no manifest": "is no elastic checkpoint",
    "half a manifest": "is damaged",
    "newer": "this version reads 1",
    "optimizer": "saved by GateRiemannianAdamW, this run trains with AdamW",
    "rank": "r, num_experts and the base model must be those",
    "frozen": "are not trained here",
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_refuses_before_it_changes_anything(damage: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder)
    manifest, second = folder / "elastic.json", folder / "00001.safetensors"
    if damage == "truncated":
        second.write_bytes(second.read_bytes()[:-4])
    elif damage == "missing":
        second.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    for text, same in run_on_ranks(2, refused, damage=damage, folder=str(folder)):
        assert DAMAGE[damage] in text
        assert same


def fails_to_write(folder: str) -> str:
    """On every rank: the disk of rank 0 is full from the second file on."""
    import deepspeed

    from ds_moelora.checkpoint import elastic_folder

    module = adapted()
    params = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=params, config=engine_config(2, "GateRiemannianAdamW")
    )
    written, original = [], elastic_folder.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        original(tensors, path, **options)

    elastic_folder.save_file = full  # type: ignore[assignment]
    try:
        with pytest.raises(RuntimeError) as caught:
            ds_moelora.save_elastic(engine, folder)
    finally:
        elastic_folder.save_file = original
    engine.destroy()
    return str(caught.value)


def test_a_full_disk_stops_every_rank_and_keeps_the_older_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    shutil.copytree(trained, folder)
    for text in run_on_ranks(2, fails_to_write, folder=str(folder)):
        assert "rank 0: OSError: [Errno 28] No space left on device" in text
    assert read_manifest(folder) == read_manifest(trained)


def test_a_newer_checkpoint_takes_the_place_of_an_older_one(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(trained, folder)
    (folder / "stale.safetensors").write_bytes(b"")
    config = {**engine_config(1, "GateRiemannianAdamW"), "scheduler": copy.deepcopy(WARMUP)}
    run_on_ranks(2, resave, config=config, ep_size=1, load=str(trained), save=str(folder))
    assert read_manifest(folder)["topology"]["world_size"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not (folder / "stale.safetensors").exists()


def watched_save(folder: str) -> tuple[int, int]:
    """On every rank: the most bytes of whole tensors alive at once while saving, and the bytes of all of them."""
    import deepspeed

    module = adapted(target_modules="all-linear", modules_to_save=None)
    params = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=params, config=engine_config(3, "GateRiemannianAdamW")
    )
    x, target = batches(1, 1, 1)[0][0][0]
    engine.backward(engine(x, target)["loss"])
    engine.step()
    alive: list[weakref.ref[torch.Tensor]] = []
    peak = total = 0
    original = dist.reduce

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal peak, total
        alive.append(weakref.ref(tensor.untyped_storage()))
        storages = [s for s in (ref() for ref in alive) if s is not None]
        peak, total = max(peak, sum(s.nbytes() for s in storages)), total + tensor.nbytes
        return original(tensor, *args, **kwargs)

    dist.reduce = reduce  # type: ignore[assignment]
    try:
        ds_moelora.save_elastic(engine, folder)
    finally:
        dist.reduce = original
    engine.destroy()
    return peak, total


def test_rank_0_never_holds_more_than_one_layer(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    peak, total = run_on_ranks(2, watched_save, folder=str(folder))[0]
    manifest = read_manifest(folder)
    layers: dict[str, int] = {}
    for entry in manifest["parameters"].values():
        size = 4 * math.prod(entry["shape"]) * (1 + len(entry["states"]))
        layers[entry["file"]] = layers.get(entry["file"], 0) + size
    assert sum(layers.values()) == total
    assert len(layers) == 3
    assert max(layers.values()) / 2 < peak <= max(layers.values())


def saves_too_early(folder: str) -> str:
    import deepspeed

    module = adapted()
    params = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=params, config=engine_config(1, "GateRiemannianAdamW", accumulate=2)
    )
    x, target = batches(1, 1, 1)[0][0][0]
    engine.backward(engine(x, target)["loss"])
    engine.step()
    with pytest.raises(ValueError, match="accumulation boundary") as caught:
        ds_moelora.save_elastic(engine, folder)
    engine.destroy()
    return str(caught.value)


def test_refuses_to_save_in_the_midst_of_accumulation(tmp_path: Path) -> None:
    texts = run_on_ranks(2, saves_too_early, folder=str(tmp_path / "early"))
    assert all("1 micro-steps were done, of 2 per step" in text for text in texts)
    assert not list(tmp_path.iterdir())
