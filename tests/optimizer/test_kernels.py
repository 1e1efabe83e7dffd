"""The C++ kernels, the default on CPUs: equal to torch's way within rounding, whatever the cut."""

from __future__ import annotations

import copy
import fcntl
import functools
import multiprocessing as mp
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_moelora import GateRiemannianAdamW, GateRiemannianSGD
from ds_moelora.optimizer import kernels
from ds_moelora.optimizer.kernels import build
from ds_moelora.optimizer.kernels.adamw import complement
from ds_moelora.optimizer.kernels.cpp import RANKS, SOURCE, load_kernels
from ds_moelora.optimizer.kernels.rows import RowBlock, RowBlocks
from ds_moelora.optimizer.preconditioner import damped_inverse, gram
from ds_moelora.optimizer.step_statistics import StepStatistics
from ds_moelora.pairs import LoraPair, tag_pair

from ..support.mixture import Stack, batches
from ..support.plain_lora import plain_lora
from ..support.ranks import run_on_ranks
from ..support.training import OPTIMIZERS, deviation, engine_config, loraplus_groups, one_group, run_engine

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC: apt-get install g++")

SHAPES = [(7, 5, 3, 4), (5, 11, 2, 3), (11, 7, 3, 2)]  # rank 3 is torch's work
CLASSES: dict[str, Any] = {"GateRiemannianAdamW": GateRiemannianAdamW, "GateRiemannianSGD": GateRiemannianSGD}


@given(
    rank=st.sampled_from(RANKS),
    blocks=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 150), st.booleans()), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_torch(rank: int, blocks: list[tuple[int, int, bool]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = [(1 if rank_first else experts, rows, rank_first) for experts, rows, rank_first in blocks]
    tensors = [torch.randn((e, rank, n) if first else (e, n, rank), generator=generator) for e, n, first in blocks]
    views = [t.mT if first else t for t, (*_, first) in zip(tensors, blocks, strict=True)]
    count = sum(experts for experts, *_ in blocks)
    order = torch.randperm(count, generator=generator)
    rows, matrix = RowBlocks(rank), iter(order.tolist())
    for k, (e, n, first) in enumerate(blocks):
        rows.add(RowBlock(k, 0, e, n, rank, first), [next(matrix) for _ in range(e)])

    grams = torch.zeros(count, rank, rank)
    load_kernels().add_grams_(grams, rows, tensors)
    expected = torch.zeros_like(grams).index_add_(0, order, torch.cat([gram(view) for view in views]))
    torch.testing.assert_close(grams, expected, rtol=1e-5, atol=1e-4)

    damping = torch.rand(count, generator=generator) + 1
    inverses = load_kernels().damped_inverse(grams, damping)
    torch.testing.assert_close(inverses, damped_inverse(grams, damping), rtol=1e-3, atol=1e-5)

    products = [torch.bmm(v, m) for v, m in zip(views, inverses[order].split([e for e, *_ in blocks]), strict=True)]
    load_kernels().precondition_(inverses, rows, tensors)
    for view, product in zip(views, products, strict=True):
        torch.testing.assert_close(view, product, rtol=1e-4, atol=1e-5)


@given(
    r=st.sampled_from(RANKS),
    n=st.integers(1, 300),
    distinct=st.integers(1, 3),
    scale=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_singular_grams_have_a_sound_inverse(r: int, n: int, distinct: int, scale: int, seed: int) -> None:
    """The bounds of tests/optimizer/test_preconditioner.py."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(min(distinct, r), r, generator=generator) * 10.0**scale
    G = gram(torch.randn(1, n, len(basis), generator=generator) @ basis)
    inverse = load_kernels().damped_inverse(G, 0.0)
    eigenvalues, trace = torch.linalg.eigvalsh(inverse[0].double()), G[0].double().trace()
    d = max(torch.finfo(torch.float32).eps * trace.item(), torch.finfo(torch.float32).tiny)
    assert eigenvalues.max() <= 16 / d
    assert eigenvalues.min() >= 0.9 / (trace + d) - 1e-5 * eigenvalues.max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_stays_visible_and_local(value: float) -> None:
    G = torch.eye(4).repeat(3, 1, 1)
    G[1, 2, 1] = G[1, 1, 2] = value
    inverse = load_kernels().damped_inverse(G, 1e-6)
    assert inverse[1].isnan().all()
    torch.testing.assert_close(inverse[::2], torch.eye(4).repeat(2, 1, 1))


def test_complement() -> None:
    assert complement([(6, 8), (2, 4), (4, 5)], 10) == [(0, 2), (5, 6), (8, 10)]
    assert complement([(0, 10)], 10) == []


def train(kind: str, kernels: str, groups: Callable[[nn.Module], Any], stop: int | None = None) -> Any:
    """Weights after six steps; with `stop`, through a saved and loaded optimizer after so many."""
    model = Stack(SHAPES)
    make = CLASSES[kind]
    optimizer = make(groups(model), **OPTIMIZERS[kind], kernels=kernels)
    for step, micro in enumerate(batches(6, 1, 1)):
        if step == stop:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make(groups(model), **OPTIMIZERS[kind], kernels=kernels)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        model(*micro[0][0]).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, optimizer.state_dict()


@pytest.mark.parametrize("groups", [one_group, loraplus_groups])
@pytest.mark.parametrize("kind", CLASSES)
def test_training_equals_torchs(kind: str, groups: Callable[[nn.Module], Any]) -> None:
    weights, state = train(kind, "cpp", groups)
    plain, plain_state = train(kind, "torch", groups)
    assert deviation(weights, {n: p.double() for n, p in plain.items()}) < 1e-5
    for mine, other in zip(state["state"].values(), plain_state["state"].values(), strict=True):
        assert mine.keys() == other.keys()  # one may be loaded by the other
        assert kind == "GateRiemannianSGD" or torch.equal(mine["step"], other["step"])
    resumed, _ = train(kind, "cpp", groups, stop=3)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", CLASSES)
def test_threads_change_no_bit(kind: str) -> None:
    def stepped(threads: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, before = Stack([(300, 200, 3, 4), (64, 300, 2, 8)]), torch.get_num_threads()
        optimizer = CLASSES[kind](one_group(model), **OPTIMIZERS[kind], kernels="cpp")
        torch.set_num_threads(threads)
        try:
            for _ in range(2):
                for p in optimizer.param_groups[0]["params"]:
                    p.grad = torch.randn_like(p)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return [p.detach() for p in optimizer.param_groups[0]["params"]]

    assert all(torch.equal(one, three) for one, three in zip(stepped(1), stepped(3), strict=True))


def test_watched_steps_are_the_same_steps() -> None:
    """What is watched are preconditioned gradients, which the fused step never writes: torch takes those steps."""
    seen = []

    class Every2nd(GateRiemannianAdamW):
        def step(self, closure: Any = None) -> Any:
            self.statistics = None if self.statistics else StepStatistics()
            loss = super().step(closure)
            if self.statistics:
                seen.append(float(self.statistics.preconditioned))
            return loss

    plain, _ = train("GateRiemannianAdamW", "cpp", one_group)
    with mock.patch.dict(CLASSES, GateRiemannianAdamW=Every2nd):
        watched, _ = train("GateRiemannianAdamW", "cpp", one_group)
    assert deviation(watched, {name: p.double() for name, p in plain.items()}) < 1e-5
    assert len(seen) == 3
    assert all(value > 0 for value in seen)


def run_sharded(stages: list[int]) -> list[tuple[float, bool]]:
    """On every rank: the deviation of the kernels from torch's way, and whether anything moved, for each case."""
    found = []
    cases: list[tuple[int, str, Callable[[], nn.Module]]] = [
        (stage, kind, lambda: Stack(SHAPES)) for stage in stages for kind in CLASSES
    ]
    for stage, kind, model in [*cases, (2, "GateRiemannianAdamW", functools.partial(plain_lora, r=4))]:
        config = engine_config(stage, kind)
        config["optimizer"]["params"]["kernels"] = "torch"
        plain = run_engine(config, model=model, steps=4)["weights"]
        config["optimizer"]["params"]["kernels"] = "cpp"
        weights = run_engine(config, model=model, steps=4)["weights"]
        exact = {name: w.double() for name, w in plain.items()}
        found.append((deviation(weights, exact), any(not torch.equal(weights[n], plain[n]) for n in plain)))
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 3])
def test_sharded_equals_torchs(world: int, report: Callable[[str, str], None]) -> None:
    """Boundaries cut rows; flat partitions hold routers, biases and padding between pairs."""
    for found in run_on_ranks(world, run_sharded, stages=[0, 2, 3]):
        report("C++ kernels against torch", f"world {world}: " + ", ".join(f"{d:.1e}" for d, _ in found))
        assert all(d < 1e-5 for d, _ in found)
        assert any(moved for _, moved in found)  # other roundings: the kernels were at work


def pair(rank: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    A, B = (nn.Parameter(torch.randn(2, 6, rank, dtype=dtype)) for _ in range(2))
    tag_pair(LoraPair("layer", 2, rank), A, B)
    for p in (A, B):
        p.grad = torch.randn_like(p)
    return [A, B]


@pytest.mark.parametrize(("params", "message"), [(pair(3), "rank"), (pair(4, torch.float64), "float64")])
def test_no_effect_is_an_error(params: list[nn.Parameter], message: str) -> None:
    with pytest.raises(ValueError, match=rf'kernels "cpp" .*{message}.*"kernels": "torch"'):
        GateRiemannianAdamW(params, kernels="cpp").step()
    before = [p.detach().clone() for p in params]
    GateRiemannianAdamW(params).step()
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_an_unknown_choice() -> None:
    with pytest.raises(ValueError, match="'gcc' is unknown; choose one of 'auto', 'torch', 'cpp', 'triton'"):
        GateRiemannianAdamW(pair(4), kernels="gcc")


# -- building them


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the compiler was called; nothing is built yet, and it need not optimise."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho called >> {calls}\nexec {shutil.which("g++")} "$@" -O0\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def test_many_processes_build_once(compiler: Callable[[], int]) -> None:
    processes = [mp.get_context("fork").Process(target=build.load_library, args=(SOURCE,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert compiler() == 1
    assert hasattr(build.load_library(SOURCE), "add_grams")
    assert compiler() == 1


def test_another_source_cpu_or_torch_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels.cpp").write_text(SOURCE.read_text() + "\n")
    keys = [build._key(SOURCE, "g++"), build._key(SOURCE, "g++-9"), build._key(tmp_path / "kernels.cpp", "g++")]
    monkeypatch.setattr(build, "_cpu", lambda: ["flags: none"])
    keys.append(build._key(SOURCE, "g++"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({*keys, build._key(SOURCE, "g++")}) == 5


def test_a_lock_that_stays_or_a_place_that_cannot_be_written(
    compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "LIMIT", 0.0)
    monkeypatch.setattr(build, "_compile", lambda *_: (_ for _ in ()).throw(ValueError("built for itself")))
    folder = build.cache_folder()
    folder.mkdir(parents=True)
    lock = folder / f"kernels-{build._key(SOURCE, os.environ['CXX'])}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="built for itself"):
            build.load_library(SOURCE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="built for itself"):
        build.load_library(SOURCE)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Named, it is an error; by default torch steps, which is said once."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "load_kernels", load_kernels.__wrapped__)
    monkeypatch.setattr(kernels, "_automatic", functools.cache(kernels._automatic.__wrapped__))
    with pytest.raises(ValueError, match=r"no-such-compiler.*Install g\+\+"):
        GateRiemannianAdamW(pair(4), kernels="cpp")
    for _ in range(2):
        GateRiemannianAdamW(pair(4)).step()
    assert sum("step is torch's" in record.message for record in caplog.records) == 1


def test_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ for what it knows; torch for replicas in several processes, which must all round alike."""
    weights = [torch.zeros(8)]
    cases = ((4, False), (3, False), (4, True))
    found = [kernels.choose("auto", None, weights, {rank}, replicated) for rank, replicated in cases]
    assert [k and k.name for k in found] == ["cpp", None, None]
    assert kernels.choose("auto", None, [torch.zeros(8).half()], {4}, False) is None
