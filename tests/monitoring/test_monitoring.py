"""What monitoring reports: against a slow formula, the same on any number of ranks, and written where it should be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ds_moelora import GateRiemannianSGD
from ds_moelora.monitoring import TAGS, EngineMonitor, MoELoRACallback
from ds_moelora.monitoring.descriptions import DESCRIPTIONS
from ds_moelora.monitoring.heat_map import _split, colors_of, heat_map
from ds_moelora.monitoring.meter import TrainingMeter
from ds_moelora.optimizer.preconditioner import condition_numbers, damped_inverse
from ds_moelora.tuner import MoELoRAExperts

from ..support.adapter_support import VOCAB, adapted
from ..support.ranks import run_on_ranks
from ..support.training import engine_of as start_engine

# Of fp32 sums in another order; the loads are counts, and exact.
TOLERANCE = 1e-4
ROWS, LENGTH, PADS, STEPS = 4, 7, 2, 2
OF_THE_RUN = tuple(tag for tag in TAGS if tag.startswith(("moe/", "riemannian/")))


def batch(step: int, rows: slice) -> dict[str, Tensor]:
    """Rows with equally many tokens, so that the loss of a batch is the mean over its parts."""
    ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    mask = torch.ones_like(ids)
    mask[:, LENGTH - PADS :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {name: value[rows] for name, value in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def engine_of(stage: int = 0, ep_size: int = 1, accumulate: int = 1, checkpointing: bool = False, **config: Any) -> Any:
    model = adapted(ep_size=ep_size, shared_expert=True, num_experts_pattern={"v_proj": 2}).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = {
        "train_batch_size": ROWS,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": 1e-3, "eps": 1e-3, "damping": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **config,
    }
    return start_engine(model, config)


def train(engine: Any, steps: int = STEPS) -> Any:
    """Yields before every step's first forward pass, and after its last."""
    accumulate, size = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    for step in range(steps):
        for i in range(accumulate):
            first = (dist.get_rank() * accumulate + i) * size
            engine.backward(engine(**batch(step, slice(first, first + size))).loss)
            engine.step()
        yield


def measured(**settings: Any) -> list[tuple[dict[str, float], Tensor]]:
    """On every rank: the reports of a short run."""
    engine = engine_of(**settings)
    meter, reports = TrainingMeter(engine.module, engine), []
    meter.arm()
    for _ in train(engine):
        report = meter.step_done()
        assert report is not None
        reports.append((report.scalars, report.loads))
        meter.arm()
    meter.close()
    engine.destroy()
    return reports


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, float], Tensor]]:
    return run_on_ranks(1, measured)[0]


@pytest.mark.dist
@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 0},
        {"stage": 1, "accumulate": 2},
        {"stage": 2, "checkpointing": True},
        {"stage": 3, "accumulate": 2, "checkpointing": True},
        {"stage": 0, "ep_size": 2},
        {"stage": 2, "ep_size": 2, "accumulate": 2, "checkpointing": True},
    ],
    ids=str,
)
def test_equal_over_ranks(settings: dict[str, Any], alone: list[tuple[dict[str, float], Tensor]]) -> None:
    results = run_on_ranks(2, measured, **settings)
    for mine in results:
        for (found, loads), (expected, expected_loads) in zip(mine, alone, strict=True):
            assert set(OF_THE_RUN) <= set(found)
            assert torch.equal(loads.nan_to_num(-1), expected_loads.nan_to_num(-1))
            for tag in OF_THE_RUN:
                assert found[tag] == pytest.approx(expected[tag], rel=TOLERANCE), tag
    assert results[0][0][0] == results[1][0][0], "every rank has the same report"


def test_against_a_slow_formula() -> None:
    """One process, no DeepSpeed: routers by hooks and loops, the optimizer by the weights before and after a step."""
    model = adapted(num_experts=3, shared_A=False).train()
    optimizer = GateRiemannianSGD([p for p in model.parameters() if p.requires_grad], lr=0.5, damping=1e-3)
    layers = [m for m in model.modules() if isinstance(m, MoELoRAExperts)]
    inputs: dict[Any, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0])) for m in layers]
    meter = TrainingMeter(model, optimizer)
    assert meter.step_done() is None, "not armed"
    meter.arm()
    model(**batch(0, slice(None))).loss.backward()
    routers = [m.router.weight.detach().clone() for m in layers]
    pairs = [p for m in layers for p in m.factors()]
    old, raw = [p.detach().clone() for p in pairs], [p.grad.clone() for p in pairs]
    kappa = max(condition_numbers(G, 1e-3, damped_inverse(G, 1e-3)).max().item() for p in old for G in [p.mT @ p])
    optimizer.step()
    report = meter.step_done()
    assert report is not None
    assert optimizer.statistics is None
    for hook in hooks:
        hook.remove()

    ratios, entropies, dead = [], [], 0
    for layer, (module, router) in enumerate(zip(layers, routers, strict=True)):
        counts, entropy = torch.zeros(3), 0.0
        for x in inputs[module].detach()[:, : LENGTH - PADS].flatten(0, 1):
            logits = router @ x
            counts[logits.topk(2).indices] += 1
            entropy -= (logits.softmax(0) * logits.log_softmax(0)).sum().item() / np.log(3)
        torch.testing.assert_close(report.loads[layer].float(), counts * 3 / counts.sum())
        ratios.append((counts.max() * 3 / counts.sum()).item())
        entropies.append(entropy / (ROWS * (LENGTH - PADS)))
        dead += int((counts == 0).sum())
    updates = [(a - b.detach()) for a, b in zip(old, pairs, strict=True)]
    norm = {k: torch.nn.utils.get_total_norm(v).item() for k, v in (("w", old), ("g", raw), ("u", updates))}
    expected = {
        "moe/load_max_over_ideal": np.mean(ratios),
        "moe/router_entropy": np.mean(entropies),
        "moe/dead_expert_fraction": dead / (3 * len(layers)),
        "moe/aux_loss": model.base_model.last_aux_loss.item(),
        "riemannian/gram_condition_max": kappa,
        "riemannian/update_to_weight": norm["u"] / norm["w"],
        "riemannian/preconditioned_over_raw": norm["u"] / 0.5 / norm["g"],
    }
    for tag, value in expected.items():
        assert report.scalars[tag] == pytest.approx(value, rel=TOLERANCE), tag
    steps = 2  # the one that was not reported counts for the times
    tokens = report.scalars["perf/tokens_per_second"] * report.scalars["perf/step_seconds"] * steps
    assert tokens == pytest.approx(ROWS * (LENGTH - PADS))
    meter.close()
    assert model.base_model.router_listener is None


def with_engine_monitor(folder: str) -> None:
    block = {"tensorboard": {"enabled": True, "output_path": folder, "job_name": "run"}}
    engine = engine_of(stage=2, **block)
    monitor = EngineMonitor(engine, every=2, heat_map_every=1)
    for _ in train(engine, steps=4):
        monitor.step()
    monitor.close()
    engine.destroy()
    engine = engine_of()
    with pytest.raises(ValueError, match=re.escape('"tensorboard": {"enabled": true')):
        EngineMonitor(engine)
    engine.destroy()


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@pytest.mark.dist
def test_deepspeeds_own_tensorboard_block(tmp_path: Path) -> None:
    run_on_ranks(2, with_engine_monitor, folder=str(tmp_path))
    found = events(tmp_path / "run")
    assert set(TAGS) <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("moe/aux_loss")] == [1, 2, 4]
    assert [event.step for event in found.Images("moe/load")] == [1, 2, 4]
    assert (
        "GateRiemannianAdamW" in found.Tensors("run/configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    )


def test_callback(tmp_path: Path) -> None:
    """Same run as the Trainer's own curves, one tag per quantity whatever the depth, HParams beside them."""
    model = adapted()
    rows = [{name: value[0] for name, value in batch(i, slice(0, 1)).items()} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, per_device_train_batch_size=2, save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match='report_to="tensorboard"'):
        MoELoRACallback(Trainer(model, args, train_dataset=rows))
    args.report_to = ["tensorboard"]
    trainer = Trainer(model, args, train_dataset=rows)
    with pytest.raises(ValueError, match="heat_map_every=-1"):
        MoELoRACallback(trainer, heat_map_every=-1)
    trainer.add_callback(MoELoRACallback(trainer, heat_map_every=2))
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    found = events(folder)
    own = [tag for tag in found.Tags()["scalars"] if not tag.startswith(("train/", "eval/"))]
    assert set(own) == {tag for tag in TAGS if not tag.startswith("riemannian/")}
    assert [event.step for event in found.Scalars("moe/router_entropy")] == [2, 4]
    assert [event.step for event in found.Images("moe/load")] == [2]
    for tag in found.Tags()["scalars"]:
        if tag in TAGS:
            assert found.summary_metadata[tag].summary_description == DESCRIPTIONS[tag]
    assert DESCRIPTIONS.keys() >= {*TAGS}
    experiment = found.summary_metadata["_hparams_/experiment"].plugin_data.content
    first = ("learning_rate", "optimizer", "num_experts", "top_k", "per_device_train_batch_size", "lora_alpha")
    places = [experiment.index(name.encode()) for name in first]
    assert places == sorted(places)
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= set(found.summary_metadata)


def test_heat_map() -> None:
    loads = torch.tensor([[1.0, 0.0, 4.0], [0.25, 8.0, torch.nan]])
    colors = colors_of(loads).tolist()
    assert colors[0] == [[247, 247, 247], [0, 0, 0], [178, 24, 43]]
    assert colors[1] == [[33, 102, 172], [178, 24, 43], [255, 255, 255]]
    image = heat_map(loads, ["base_model.model.layers.0.q_proj", "x" * 99], step=3)
    assert image.dtype == np.uint8
    pixels = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    assert {(33, 102, 172), (178, 24, 43), (247, 247, 247), (0, 0, 0)} <= pixels
    assert heat_map(torch.ones(500, 256), ["x"] * 500, step=1).shape[0] < 3200
    kinds = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names = [f"base_model.model.model.layers.{layer}.{kind}" for layer in range(30) for kind in kinds]
    height, width, _ = heat_map(torch.ones(210, 8), names, step=1).shape
    assert height < 1200
    assert width <= 1600, "seven panels of 30 rows, on one screen"
    assert _split(names[-1]) == ("mlp.down_proj", "29")
    assert _split("base_model.model.lm_head") == ("lm_head", "")
