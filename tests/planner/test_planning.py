"""The planner's traffic, times and choice."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moelora.expert_parallel.dispatch import bytes_moved
from ds_moelora.expert_parallel.gather import WINDOW_BYTES
from ds_moelora.planner.hardware import Group, Hardware, hardware, load_calibration
from ds_moelora.planner.model import ModelShape, describe_model
from ds_moelora.planner.planner import EQUALLY_FAST, DoesNotFitError, candidates, choices, evaluate, make_plan
from ds_moelora.planner.timing import step_flops
from ds_moelora.planner.traffic import expert_data_group, expert_group, step_traffic
from ds_moelora.planner.workload import Choice, Workload
from tests.support.planning import NET

CONFIGS = Path(__file__).parents[2] / "benchmarks/model_configs"
TWO = Workload(num_experts=4, rank=3, gpus=2, sequence_length=6, checkpointing=False)
CALIBRATION = {
    "backend": "gloo",
    "hardware": "a test",
    "date": "2026-11-22",
    "collectives": {
        "all_gather": {"latency_s": 1e-3, "seconds_per_byte": 1e-9},
        "reduce_scatter": {"latency_s": 2e-3, "seconds_per_byte": 2e-9},
        "all_to_all": {"latency_s": 3e-3, "seconds_per_byte": 3e-9},
    },
    "flops_per_second": {"dense": 1e10, "grouped": 5e9},
}


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return describe_model(CONFIGS / "llama3_8b.json")


def sent(work: Workload, choice: Choice) -> dict[str, float]:
    return {t.name: t.sent for t in step_traffic(NET, work, choice)}


def test_traffic_by_hand() -> None:
    """336 expert and 48 router elements of 2 bytes; a ring of two sends half of them, an all-reduce twice that."""
    # The one boundary lies in expert 1 of the second A, whose B is the second GPU's: of experts 0 and 1 one triangle of
    # A's Gram matrix goes one way, of B's the other. A cut row's weight goes to one GPU, its gradient to both.
    grams = 4 * (4 * 6 + 3 * 3) / 2  # per GPU
    assert sent(TWO, Choice(stage=0)) == {"gradients, experts": 672, "gradients, routers": 96}
    assert sent(TWO, Choice(stage=2)) == {
        "gradients, experts": 672,
        "new weights, experts": 336,
        "gradients, routers": 96,
        "new weights, routers": 48,
        "Gram matrices": grams,
    }
    weights = (142 + 336 + 48) * 2 / 2
    assert sent(TWO, Choice(stage=3)) == {
        "weights, forward": weights,
        "weights, backward": weights,
        "gradients": 384,  # every factor is cut between experts 1 and 2: all Gram matrices are where they are wanted
    }
    assert sent(replace(TWO, num_experts=3), Choice(stage=3))["Gram matrices"] > 0
    # Both ranks share the experts: nobody else has the same ones, and only the routers are reduced.
    assert sent(TWO, Choice(stage=1, ep_size=2, dispatch="weights")) == {
        "gradients, routers": 96,
        "new weights, routers": 48,
        "experts, forward": 336,
        "experts, backward": 336,
        "experts' gradients": 336,
    }


@pytest.mark.parametrize("dispatch", ["weights", "tokens"])
@pytest.mark.parametrize(("num_experts", "ep_size", "top_k"), [(4, 2, 2), (16, 8, 1), (64, 4, 6)])
def test_dispatch_sends_what_the_package_says(dispatch: str, num_experts: int, ep_size: int, top_k: int) -> None:
    work = Workload(
        num_experts=num_experts, rank=5, top_k=top_k, gpus=8, micro_batch=3, sequence_length=7, checkpointing=False
    )
    found = step_traffic(NET, work, Choice(stage=2, ep_size=ep_size, dispatch=dispatch))
    moved = sum(t.sent for t in found if t.name.startswith(("experts,", "experts'", "tokens")))
    layers = [(m.in_features, m.out_features) for m in NET.linears if m.adapted]
    expected = [bytes_moved(num_experts, ep_size, top_k, i, o, 5, 21, 2)[dispatch] for i, o in layers]
    assert moved == pytest.approx(sum(expected))


def test_groups_in_nodes() -> None:
    work = Workload(num_experts=64, rank=4, gpus=64)
    expected = {  # ep_size: group of tokens and experts, group that holds the same experts
        2: (Group(2, 2), Group(32, 4)),
        8: (Group(8, 8), Group(8, 1)),
        16: (Group(16, 8), Group(4, 1)),
        64: (Group(64, 8), Group(1, 1)),
    }
    for ep_size, groups in expected.items():
        way = Choice(stage=2, ep_size=ep_size, dispatch="weights")
        assert (expert_group(work, way), expert_data_group(work, way)) == groups


def test_network_by_hand() -> None:
    network = hardware("h100", 400e9, 50e9, latency=1e-6).network
    assert network.seconds("all_gather", Group(1, 1), 1e9, 5) == 0
    assert network.seconds("all_gather", Group(8, 8), 4e9, 2) == pytest.approx(0.01 + 2 * 3e-6)
    assert network.seconds("all_gather", Group(16, 2), 1e9, 1) == pytest.approx(0.01 + 4e-6)  # two links per node
    assert network.seconds("all_reduce", Group(64, 8), 4e9, 1) == pytest.approx(0.01 + 6e-6)  # eight: as fast as inside
    assert network.seconds("all_to_all", Group(16, 8), 1e9, 1) == pytest.approx(8 / 15 / 50 + 4e-6)
    # Slow links inside can be what all-to-all waits for.
    assert hardware("h100", 1e9, 50e9, latency=1e-6).network.seconds(
        "all_to_all", Group(16, 8), 1e9, 1
    ) == pytest.approx(7 / 15 + 4e-6)


def test_flops_by_hand() -> None:
    """6 tokens. Base 7*5 + 5*11 + 11*3 = 123 weights, 4 FLOPs each; routers 4 * 12; experts 12 columns, I + O = 28."""
    flops = step_flops(NET, TWO, Choice(stage=0))
    assert flops == (6 * (4 * 123 + 6 * 48), 6 * 6 * 12 * 28)
    again = step_flops(NET, replace(TWO, checkpointing=True), Choice(stage=0))
    assert again == (6 * (6 * 123 + 8 * 48), 6 * 8 * 12 * 28)
    assert step_flops(NET, replace(TWO, expert_compute="grouped"), Choice(stage=0)).experts == 6 * 6 * 6 * 28
    # 6 own rows and 6 from the other rank, 5/6 of which need a given rank's two experts; 6 columns there.
    tokens = step_flops(NET, TWO, Choice(stage=0, ep_size=2, dispatch="tokens")).experts
    assert tokens == pytest.approx(12 * 5 / 6 * 6 * 6 * 28)


def test_comparison_with_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/check_plan.py, on results that say what is planned, but for one way that is twice as fast."""
    spec = importlib.util.spec_from_file_location("check_plan", CONFIGS.parent / "check_plan.py")
    assert spec is not None
    assert spec.loader is not None
    check_plan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_plan)
    calibration, results = tmp_path / "calibration.json", tmp_path / "results.csv"
    calibration.write_text(json.dumps(CALIBRATION))
    machine = load_calibration(calibration, hardware())
    sizes = {"ranks": "2", "layers": "1", "E": "8", "k": "2", "r": "4", "tokens_per_rank": "32", "features": "64"}
    rows = [{**sizes, "case": case} for case in check_plan.WAYS]
    planned = [check_plan.planned_ms(row, machine) for row in rows]
    fastest, slowest = planned.index(min(planned)), planned.index(max(planned))
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "ms_median"])
        writer.writeheader()
        for i, row in enumerate(rows):
            writer.writerow({**row, "ms_median": str(planned[fastest] / 2 if i == slowest else planned[i])})
    check_plan.main(["--calibration", str(calibration), "--results", str(results)])
    text = capsys.readouterr().out
    assert f"| {rows[fastest]['case']} | 100% |" in text
    assert "planned / measured, 32 tokens: 1.00 (1.00 to" in text


def test_calibration_is_used(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(CALIBRATION))
    machine = load_calibration(path, hardware())
    assert machine.name == "a test, measured 2026-11-22"
    seconds = machine.network.seconds
    assert seconds("all_to_all", Group(4, 4), 100, 7) == pytest.approx(7 * 3e-3 + 3e-7)
    assert seconds("all_reduce", Group(4, 4), 100, 1) == pytest.approx(3e-3 + 50 * 3e-9)
    way = Choice(stage=1, ep_size=2, dispatch="weights")
    flops, time = step_flops(NET, TWO, way), evaluate(NET, TWO, way, machine).time
    assert time.compute == pytest.approx(sum(flops) / 1e10)
    assert time.overlapped == pytest.approx(1e-3 + 336e-9)  # both layers in one gather
    grouped = replace(TWO, expert_compute="grouped")
    base, experts = step_flops(NET, grouped, way)
    assert evaluate(NET, grouped, way, machine).time.compute == pytest.approx(base / 1e10 + experts / 5e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"collectives": {}}, "is not one .KeyError: 'all_gather'"),
        ({"flops_per_second": {"dense": 1e9}}, "is not one .KeyError: 'grouped'"),
        ({"flops_per_second": {"dense": 0, "grouped": 1}}, "dense=0.0 must be > 0"),
        ({"collectives": []}, "is not one"),
    ],
)
def test_wrong_calibrations_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**CALIBRATION, **change}))
    with pytest.raises(ValueError, match=message):
        load_calibration(path, hardware())
    with pytest.raises(ValueError, match="cannot be read"):
        load_calibration(tmp_path / "nothing.json", hardware())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": 0}, "gpus=0 must be an integer >= 1"),
        ({"gpus": 12}, "gpus=12 is not a multiple of gpus_per_node=8.*e.g. 8"),
        ({"num_experts": 1}, "top_k=2 is larger than num_experts=1"),
        ({"rank": 2.5}, "rank=2.5 must be an integer"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; use one of bf16, fp16, fp32"),
        ({"base_bytes": 0.0}, "base_bytes=0.0 must be > 0"),
    ],
)
def test_wrong_workloads_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**{"num_experts": 8, "rank": 4, "gpus": 8, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu": "abacus"}, "gpu='abacus' is unknown"),
        ({"intra": "string"}, "intra='string' is unknown"),
        ({"inter": -1.0}, "inter=-1.0 must be > 0"),
        ({"efficiency": 1.5}, r"efficiency=1.5 must be in \(0, 1\]"),
        ({"memory": 0.0}, "memory=0.0 must be > 0"),
    ],
)
def test_wrong_machines_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hardware(**fields)


def test_choices_are_those_that_the_package_accepts() -> None:
    found = set(choices(Workload(num_experts=12, rank=2, gpus=8)))
    assert {c.ep_size for c in found} == {1, 2, 4}
    assert all(c.ep_size == 1 for c in found if c.stage == 3)
    assert all((c.dispatch == "") == (c.ep_size == 1) for c in found)
    assert list(choices(Workload(num_experts=12, rank=2, gpus=1))) == [Choice(stage=0)]


@given(
    st.sampled_from([8, 16, 64, 256]), st.sampled_from([4, 16, 64]), st.sampled_from([1, 8, 64]), st.floats(20e9, 300e9)
)
@settings(max_examples=30, deadline=None)
def test_the_choice_fits_and_is_fast(llama: ModelShape, num_experts: int, rank: int, gpus: int, memory: float) -> None:
    work, machine = Workload(num_experts=num_experts, rank=rank, gpus=gpus), hardware(memory=memory)
    limit = machine.usable * memory

    def fitting(number: int) -> list[Any]:
        return [c for c in candidates(llama, replace(work, gpus=number), machine) if c.memory.total <= limit]

    ways = fitting(gpus)
    if ways:
        best = make_plan(llama, work, machine).best
        assert best.memory.total <= limit
        assert best.time.total <= EQUALLY_FAST * min(c.time.total for c in ways)
        assert best.time.total <= best.time.without_overlap
        return
    with pytest.raises(DoesNotFitError) as error:
        make_plan(llama, work, machine)
    least = error.value.least_gpus
    if least is not None:
        assert fitting(least)
        fewer = least - (8 if least > 8 else 1)
        assert fewer <= gpus or not fitting(fewer)
        assert f"at least {least} GPUs" in str(error.value)


def test_when_more_gpus_do_not_help(llama: ModelShape) -> None:
    """Activations of one GPU's own tokens do not shrink."""
    work = Workload(num_experts=8, rank=4, gpus=8, sequence_length=2**20, checkpointing=False)
    with pytest.raises(
        DoesNotFitError, match=r"More GPUs do not help; use gradient checkpointing, .*fewer tokens"
    ) as e:
        make_plan(llama, work, hardware())
    assert e.value.least_gpus is None


@given(st.integers(1, 64), st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_more_tokens_take_longer_and_more_room(few: int, more: int) -> None:
    machine: Hardware = hardware()
    small, large = (replace(TWO, gpus=4, sequence_length=n) for n in (few, few + more))
    for way in choices(small):
        less, longer = (evaluate(NET, work, way, machine) for work in (small, large))
        assert less.time.without_overlap < longer.time.without_overlap
        assert less.time.total <= longer.time.total
        assert less.memory.total <= longer.memory.total


def test_published_models_have_their_published_size() -> None:
    """8.03 and 70.6 billion parameters; seven linear modules in each of 32 and 80 blocks."""
    for name, parameters, blocks in (("llama3_8b", 8_030_261_248, 32), ("llama3_70b", 70_553_706_496, 80)):
        shape = describe_model(CONFIGS / f"{name}.json")
        assert (shape.base_parameters, shape.num_blocks, shape.num_adapted) == (parameters, blocks, 7 * blocks)
        assert (shape.vocab_size, len(shape.linears)) == (128256, 7 * blocks + 1)


def test_models_that_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        describe_model(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"\['q_prj'\] not found.*Did you mean \['q_proj'\]"):
        describe_model(CONFIGS / "llama3_8b.json", ["q_prj"])


def test_a_layer_larger_than_a_window_has_a_gather_of_its_own() -> None:
    way = Choice(stage=1, ep_size=2, dispatch="weights")
    wide = replace(TWO, rank=TWO.rank * (WINDOW_BYTES // 8))
    calls = {t.name: t.calls for t in step_traffic(NET, wide, way)}
    assert calls["experts, forward"] == calls["experts, backward"] == NET.num_adapted
