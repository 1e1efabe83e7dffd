"""Elastic checkpoints: a run goes on in another topology as if nothing had happened."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

import ds_moelora
from ds_moelora.checkpoint import manifest as files
from ds_moelora.checkpoint.elastic import check_state
from ds_moelora.checkpoint.gather import gather
from ds_moelora.checkpoint.manifest import read_manifest
from ds_moelora.checkpoint.trained import Run

from ..support.expert_parallel import adapted, batches, one_step, whole_weights
from ..support.ranks import close_pool, run_on_ranks
from ..support.training import accelerator_answers, deviation, engine_config, engine_of, full_weights, trainable

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
    zero: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    """On every rank: steps first..last of the one run; mean loss of every step, learning rates, whole weights."""
    world = dist.get_world_size()
    clip = 0.0 if precision != "fp32" and stage == 0 and ep_size > 1 else 1.0
    config = engine_config(
        stage, kind, clip=clip, accumulate=MICRO_BATCHES // world, precision=precision, **(zero or {})
    )
    config |= {"scheduler": copy.deepcopy(WARMUP), **(more or {})}
    module = adapted(ep_size, **model)
    if load:  # what was trained must come from the checkpoint
        with torch.no_grad():
            for p in trainable(module):
                p.mul_(1.5)
    engine = engine_of(module, config)
    result: dict[str, Any] = {"losses": [], "lr": [], "changes": None}
    if load:
        _, lines = check_state(Run.of(engine), Path(load))
        result["changes"] = [line.partition("topology.")[2] for line in lines]
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


@pytest.mark.parametrize("kind", ["GateRiemannianAdamW", "GateRiemannianSGD", "GateRiemannianMuon", "AdamW"])
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


OFFLOAD = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
EXACT = {
    "stage 0": {"stage": 0},
    "stage 0, ep 2": {"stage": 0, "ep_size": 2},
    "stage 0, bf16": {"stage": 0, "precision": "bf16"},
    "stage 0, fp16": {"stage": 0, "precision": "fp16"},
    "stage 1, round robin, ep 2": {
        "stage": 1,
        "ep_size": 2,
        "zero": {"round_robin_gradients": True, "overlap_comm": False},
    },
    "stage 1, bf16, fp32 accumulation": {
        "stage": 1,
        "precision": "bf16",
        "more": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "stage 1, SGD": {"stage": 1, "kind": "GateRiemannianSGD"},
    "stage 2, Muon, ep 2": {"stage": 2, "ep_size": 2, "kind": "GateRiemannianMuon"},
    "stage 3, Muon, sub-groups of 50": {"stage": 3, "kind": "GateRiemannianMuon", "zero": {"sub_group_size": 50}},
    "stage 1, fp16, ep 2": {"stage": 1, "ep_size": 2, "precision": "fp16"},
    "stage 2": {"stage": 2},
    "stage 2, bf16, ep 2": {"stage": 2, "ep_size": 2, "precision": "bf16"},
    "stage 2, AdamW, round robin": {"stage": 2, "kind": "AdamW", "zero": {"round_robin_gradients": True}},
    "stage 2, offload": {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}, "more": OFFLOAD},
    "stage 3": {"stage": 3},
    "stage 3, bf16, sub-groups of 50": {"stage": 3, "precision": "bf16", "zero": {"sub_group_size": 50}},
    "stage 3, fp16": {"stage": 3, "precision": "fp16"},
    "stage 3, offload": {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}, "more": OFFLOAD},
}


@pytest.mark.parametrize("name", list(EXACT))
def test_the_same_topology_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    """Saved after three of six steps: losses, learning rates and weights of the rest are the uninterrupted run's."""
    options: dict[str, Any] = {"ep_size": 1, "kind": "GateRiemannianAdamW", **EXACT[name]}
    if options.get("precision") == "fp16" and not get_accelerator().is_fp16_supported():
        with pytest.raises(AssertionError, match="fp16"):
            run_on_ranks(2, train, first=0, last=1, **options)
        return
    folder = str(tmp_path / "saved")
    whole = run_on_ranks(2, train, first=0, last=6, **options)
    run_on_ranks(2, train, first=0, last=3, save=folder, **options)
    resumed = run_on_ranks(2, train, first=3, last=6, load=folder, **options)
    for expected, got in zip(whole, resumed, strict=True):
        assert got["changes"] == []
        assert got["losses"] == expected["losses"][3:]
        assert got["lr"] == expected["lr"][3:]
        assert got["weights"].keys() == expected["weights"].keys()
        for weight, value in expected["weights"].items():
            assert torch.equal(got["weights"][weight], value), weight


def resave(config: dict[str, Any], ep_size: int, load: str, save: str) -> None:
    """On every rank: a fresh engine takes a checkpoint over and writes it again."""
    with accelerator_answers(fp16=True):  # whatever the CPU
        engine = engine_of(adapted(ep_size), config)
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
    kind = "AdamW" if damage == "optimizer" else "GateRiemannianAdamW"
    module = adapted(r=2) if damage == "rank" else adapted()
    if damage == "frozen":
        for p in module.base_model.model.second.parameters():
            p.requires_grad_(False)
    params, engine = trainable(module), engine_of(module, engine_config(1, kind))
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r".") as caught:
        ds_moelora.load_elastic(engine, folder)
    same = all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    engine.destroy()
    return str(caught.value), same


DAMAGE = {
    "truncated": "00000.safetensors is incomplete",
    "missing": "00000.safetensors is incomplete: 0 of",
    "no manifest": "has no elastic.json",
    "half a manifest": "is damaged",
    "newer": "this version reads 3",
    "optimizer": 'optimizer.class "GateRiemannianAdamW" -> "AdamW"',
    "rank": "adapter.default.r 3 -> 2",
    "frozen": "trained.base_model.model.second.",
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_refuses_before_it_changes_anything(damage: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder)
    manifest, second = folder / "elastic.json", folder / "00000.safetensors"
    if damage == "truncated":
        second.write_bytes(second.read_bytes()[:-4])
    elif damage == "missing":
        second.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif damage == "newer":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 4}))
    for text, same in run_on_ranks(2, refused, damage=damage, folder=str(folder)):
        assert DAMAGE[damage] in text
        assert same


def change(path: Path, draw: random.Random) -> str:
    """Damages a file of a checkpoint at a drawn place; says how."""
    if path.suffix == ".json" and draw.random() < 0.7:
        found = json.loads(path.read_text())
        owner, key = found, draw.choice(list(found))
        while isinstance(owner[key], dict) and owner[key] and draw.random() < 0.8 and key != "record":
            owner, key = owner[key], draw.choice(list(owner[key]))
        value = draw.choice([None, [], {}, "x", -1, [1], {"../../x": 1}])
        if draw.random() < 0.3 or value == owner[key]:
            del owner[key]
            value = "gone"
        else:
            owner[key] = value
        path.write_text(json.dumps(found))
        return f"{key} -> {value!r}"
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if draw.random() < 0.5:
        path.write_bytes(data[:place])
        return f"cut at {place}"
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"bit of byte {place}"


def loads_drawn_damage(folder: str, scratch: str, draws: int) -> list[str]:
    """On every rank: which damages were not refused with the engine as it was."""
    module = adapted()
    config = {**engine_config(1, "GateRiemannianAdamW"), "scheduler": copy.deepcopy(WARMUP)}
    params, engine = trainable(module), engine_of(module, config)
    sound, bad, wrong = Path(folder), Path(scratch), []
    before = [p.detach().clone() for p in params]
    counters = (engine.global_steps, engine.micro_steps)
    for seed in range(draws):
        draw = random.Random(seed)
        name = draw.choice(sorted(path.name for path in sound.iterdir()) + ["elastic.json"] * 5)
        if dist.get_rank() == 0:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(sound, bad)
        dist.barrier()
        how = change(bad / name, draw) if dist.get_rank() == 0 else ""
        dist.barrier()
        try:
            ds_moelora.load_elastic(engine, bad)
            said = "loaded"
        except (ValueError, RuntimeError) as error:
            said = "" if str(bad) in str(error) else f"named no file: {error}"
        same = all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        if said or not same or counters != (engine.global_steps, engine.micro_steps):
            wrong.append(f"{seed}: {name}, {how}: {said}, weights {'kept' if same else 'changed'}")
    engine.destroy()
    return wrong


def test_drawn_damage_is_refused_before_anything_changes(trained: Path, tmp_path: Path) -> None:
    options = {"folder": str(trained), "scratch": str(tmp_path / "bad"), "draws": 80}
    wrong = run_on_ranks(2, loads_drawn_damage, **options)[0]
    assert wrong == []


def saves_what_is_not_finite(folder: str, where: str) -> tuple[str, bool]:
    """On every rank: one weight, or one number of the optimizer's, is NaN on the last rank alone."""
    engine = engine_of(adapted(), engine_config(2 if where == "state" else 0, "GateRiemannianAdamW"))
    one_step(engine)
    if where == "weight":
        with torch.no_grad():
            trainable(engine.module)[0].view(-1)[3] = math.nan
    elif dist.get_rank() == dist.get_world_size() - 1:
        next(iter(engine.basic_optimizer.state.values()))["exp_avg"][0] = math.inf
    with pytest.raises(ValueError, match="is not finite") as caught:
        ds_moelora.save_elastic(engine, folder)
    engine.destroy()
    return str(caught.value), Path(folder).exists()


@pytest.mark.parametrize("where", ["weight", "state"])
def test_what_is_not_finite_is_not_saved(where: str, tmp_path: Path) -> None:
    for text, published in run_on_ranks(2, saves_what_is_not_finite, folder=str(tmp_path / "x"), where=where):
        assert ("its weights" if where == "weight" else "exp_avg") in text
        assert not published


def fails_to_write(folder: str) -> str:
    """On every rank: the disk of rank 0 is full from the second file on."""
    engine = engine_of(adapted(), engine_config(2, "GateRiemannianAdamW"))
    written, original = [], files.save

    def full(tensors: Any, **options: Any) -> bytes:
        if written:
            raise OSError(28, "No space left on device")
        written.append(tensors)
        return original(tensors, **options)

    files.save, files.FILE_BYTES = full, 1  # type: ignore[assignment]
    try:
        with pytest.raises(RuntimeError) as caught:
            ds_moelora.save_elastic(engine, folder)
    finally:
        files.save, files.FILE_BYTES = original, 1 << 26
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
    assert read_manifest(folder)["record"]["topology.world_size"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not (folder / "stale.safetensors").exists()


def watched_save(folder: str) -> tuple[list[int], int]:
    """On every rank: bytes of every reduction while saving in buckets of 1,000 bytes, and what is saved."""
    module = adapted(target_modules="all-linear", modules_to_save=None)
    engine = engine_of(module, engine_config(3, "GateRiemannianAdamW"))
    one_step(engine)
    sizes: list[int] = []
    original, limit = dist.reduce, gather.__defaults__

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    dist.reduce, gather.__defaults__ = reduce, (1000,)  # type: ignore[assignment]
    try:
        ds_moelora.save_elastic(engine, folder)
    finally:
        dist.reduce, gather.__defaults__ = original, limit
    engine.destroy()
    return sizes, sum(4 * p.ds_numel * 3 for p in trainable(module))


def test_small_tensors_share_a_reduction_and_large_ones_are_cut(tmp_path: Path) -> None:
    for limit_sizes, total in run_on_ranks(2, watched_save, folder=str(tmp_path / "saved")):
        assert max(limit_sizes) <= 1000
        assert total <= sum(limit_sizes) <= 1.1 * total
        assert len(limit_sizes) <= total / 1000 + 2


def saves_too_early(folder: str) -> str:
    engine = engine_of(adapted(), engine_config(1, "GateRiemannianAdamW", accumulate=2))
    one_step(engine)
    with pytest.raises(ValueError, match="accumulation boundary") as caught:
        ds_moelora.save_elastic(engine, folder)
    engine.destroy()
    return str(caught.value)


def test_refuses_to_save_in_the_midst_of_accumulation(tmp_path: Path) -> None:
    texts = run_on_ranks(2, saves_too_early, folder=str(tmp_path / "early"))
    assert all("1 micro-steps were done, of 2 per step" in text for text in texts)
    assert not list(tmp_path.iterdir())
