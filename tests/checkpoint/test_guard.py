"""DeepSpeed's own checkpoints: another run's is refused before anything changes, as long as the package can see it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_moelora.checkpoint.guard import RECORD

from ..support.expert_parallel import adapted, one_step
from ..support.ranks import run_on_ranks
from ..support.training import engine_config, engine_of

pytestmark = pytest.mark.dist
LAYERS = {"target_modules": ["first"], "modules_to_save": None}


def built(kind: str = "GateRiemannianAdamW", **model: Any) -> Any:
    return engine_of(adapted(**{**LAYERS, **model}), engine_config(2, kind))


def saves(folder: str) -> None:
    engine = built()
    one_step(engine)
    engine.save_checkpoint(folder)
    engine.destroy()


def loads(folder: str, kind: str, model: dict[str, Any], options: dict[str, Any]) -> tuple[str, bool]:
    """On every rank: what was said ("" when it was loaded), and whether the weights are as they were."""
    engine = built(kind, **model)
    before = [p.detach().clone() for p in engine.module.parameters()]
    try:
        path, _ = engine.load_checkpoint(folder, **options)
        said = "" if path else "nothing was loaded"
    except ValueError as error:
        said = str(error)
    same = all(torch.equal(p, old) for p, old in zip(engine.module.parameters(), before, strict=True))
    engine.destroy()
    return said, same


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_on_ranks(2, saves, folder=str(folder))
    assert (folder / "global_step1" / RECORD).is_file()
    return str(folder)


OURS = "GateRiemannianAdamW"
RUNS = {
    "the same": (OURS, {}, {}, ""),
    "another top_k": (OURS, {"top_k": 1}, {}, "adapter.default.top_k 2 -> 1"),
    "another layer": (OURS, {"target_modules": ["second"]}, {}, "adapter.default.target_modules"),
    "another optimizer": ("GateRiemannianSGD", {}, {}, "optimizer.class"),
    "plain AdamW": ("AdamW", {}, {}, 'optimizer.class "GateRiemannianAdamW" -> "AdamW"'),
    "the model alone": ("AdamW", {}, {"load_optimizer_states": False, "load_lr_scheduler_states": False}, ""),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_another_runs_checkpoint_is_refused(name: str, saved: str) -> None:
    kind, model, options, text = RUNS[name]
    for said, same in run_on_ranks(2, loads, folder=saved, kind=kind, model=model, options=options):
        assert text in said
        assert bool(said) == bool(text)
        assert same == bool(text)


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_damaged_record_is_named(content: str, saved: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / "global_step1" / RECORD).write_text(content)
    for said, same in run_on_ranks(2, loads, folder=str(folder), kind=OURS, model={}, options={}):
        assert f"the {RECORD} of {folder} cannot be read" in said
        assert same
