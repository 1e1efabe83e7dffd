"""The language-model study: one tiny model through every kind of run, a file that resumes, and tables of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import bench_language_model as bench
from benchmarks import demo_lm, study
from benchmarks.convergence.results import Cell, Difference
from benchmarks.harness import read_rows
from benchmarks.language_model import plan, report, runs, tasks
from benchmarks.language_model.runs import Run

RUN = Run(task="mawps", method="AdamW", seed=1, lr=1e-2, steps=4, batch=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bench.Sources]:
    """A random Llama of two layers whose tokens are bytes, and a few problems."""
    folder = tmp_path_factory.mktemp("language_model")
    letters = {chr(c): c for c in range(32, 127)} | {tasks.END: 0, "<|im_start|>": 1, "\n": 2}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=tasks.END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [tasks.END, "<|im_start|>"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(folder)
    rows = {
        "mawps": [(f"{n} and {n}?", f"{n}+{n} = {2 * n}") for n in range(8)],
        "gsm8k": [(f"Twice {n}?", f"It is {2 * n}.") for n in range(8)],
        "boolq": [(f"Is it {n}?", "true") for n in range(8)],
        "openbookqa": [(f"Which is {n}?", "answer1") for n in range(8)],
    }
    for name, pairs in rows.items():
        text = "\n".join(json.dumps({"instruction": question, "output": answer}) for question, answer in pairs)
        for split in ("train", "test"):
            (folder / f"{name}.{split}.jsonl").write_text(text)
    yield bench.Sources(folder, folder)
    tasks.load.cache_clear()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the tiny model are above the real one's at first."""
    monkeypatch.setattr(runs, "PATIENCE", 99)


def test_loss_is_that_of_the_answers_alone(sources: bench.Sources) -> None:
    """Padding on the left and logits of the last positions give what each row alone, whole, would."""
    language = tasks.load(sources.model, sources.data, "mawps", "cpu")
    model = language.base.float()
    index = [1, 5, 6]
    loss, _ = language.forward(model, language.batch(language.train, index))
    total, count = 0.0, 0
    for i in index:
        prompt, answer = language.train.prompts[i], language.train.answers[i]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    language.base.bfloat16()
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", ["gMuon (sqrt)", "LoRA+, AdamW", "gRSGD (full)"])
def test_a_run(sources: bench.Sources, method: str) -> None:
    """Every kind of method trains and reports what its kind can."""
    outcome = bench.execute(replace(RUN, method=method, lr=1e-3), sources)
    assert 0 < outcome["train_loss"] < 7  # of 128 tokens, at random: 4.85
    assert 0 <= outcome["test_accuracy"] <= 1
    assert 0 <= outcome["value_accuracy"] <= 1
    assert ("gate_cv" in outcome) == ("LoRA" not in method)


def test_the_seed_that_tunes_is_not_tested(sources: bench.Sources) -> None:
    outcome = bench.execute(replace(RUN, seed=study.TUNING_SEED), sources)
    assert not {"test_loss", "test_accuracy"} & set(outcome)
    assert {"train_loss", "gate_cv"} <= set(outcome)


def test_goat_several_skills_and_upper_layers(sources: bench.Sources) -> None:
    outcome = bench.execute(replace(RUN, task="skills", start="goat", r=2, layers=1, batch=4), sources)
    assert 0 <= outcome["mutual_information"] < 2
    assert bench.execute(replace(RUN, task="gsm8k"), sources)["test_accuracy"] >= 0


def test_gate_spread() -> None:
    """Two experts with gates 3/4 and 1/4 for every token: deviation 1/4 of mean 1/2, and no difference in load."""
    spread = runs.GateSpread()
    assert spread.outcome() == {}
    logits = torch.tensor([0.75, 0.25]).log().repeat(2, 2, 1)
    spread.saw_router(None, logits, torch.ones_like(logits).bool(), torch.tensor([[1, 1], [0, 1]]))
    assert spread.outcome() == {"gate_cv": 0.5, "expert_gate_cv": 0.5, "load_cv": 0.0}


def runs_file(path: Path, work: study.Execute | None, device: str = "cpu") -> study.RunsFile:
    return study.RunsFile(path, Run, bench.OUTCOMES, work, device)


def test_a_study_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """The file is whole after every run; what it has is not run again, and an unfinished cell continues."""
    done: list[float] = []
    stop_after = 4

    def work(run: Run) -> dict[str, float]:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(run.lr)
        return {"train_loss": 1 + abs(study.rung_number(run.lr) + 9), "test_loss": 1.0, "seconds": 0.1}

    studies = [("one", [(plan.tuned, replace(RUN, seed=-1, lr=0.0))])]
    path = tmp_path / "runs.csv"
    with pytest.raises(KeyboardInterrupt):
        study.run_all(studies, runs_file(path, work), 1, 60.0)
    assert [float(row["lr"]) for row in read_rows(path)] == done
    first = list(done)
    done.clear()
    stop_after = 99
    missing = study.Sketch(runs_file(path, None), plan.first_rung)
    plan.tuned(studies[0][1][0][1], missing)
    assert len(missing.missing) == 5 - 4 + 3  # of the ladder around the first rung, and the seeds
    study.run_all(studies, runs_file(path, work), 1, 60.0)
    rows = read_rows(path)
    assert [float(row["lr"]) for row in rows][:4] == first
    assert len({(row["lr"], row["seed"]) for row in rows}) == len(rows)
    assert Cell(rows).lr == study.rung(-9)
    assert len(Cell(rows).reported) == 3
    study.run_all(studies, runs_file(path, lambda _: pytest.fail("run again")), 1, 60.0)
    study.run_all([("late", [(plan.untrained, RUN)])], runs_file(path, work), 1, -1.0)
    assert read_rows(path) == rows


def test_rows_count_whatever_device_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless one of this device is asked for; differences are taken within a device where one has both rows."""
    monkeypatch.setattr(study, "environment", lambda _: {})
    offsets = {"cuda": 0.0, "cpu": 10.0}

    def work(run: Run) -> dict[str, float]:
        return {"train_loss": offsets[run.device] + run.lr + run.seed, "seconds": 0.1}

    path = tmp_path / "runs.csv"
    seeds = [replace(RUN, seed=seed, device="cuda") for seed in (0, 1, 2, 3)]
    for run in seeds:
        runs_file(path, work, "cuda")(run)
    on_cpu = runs_file(path, work)
    assert on_cpu(replace(seeds[1], device="cpu"))["train_loss"] < 10
    assert len(read_rows(path)) == 4
    for run in seeds[1:]:
        assert on_cpu(replace(run, device="cpu"), own_device=True)["train_loss"] > 10
    a = Cell(read_rows(path))
    b = Cell([{**row, "train_loss": str(float(row["train_loss"]) - 1)} for row in a.rows if row["device"] == "cpu"])
    b.rows.append({**a.rows[0]})  # seed 0, for the rate
    assert Difference.of(a, b) == Difference((1.0, 1.0, 1.0))
    only_cuda = Cell([row for row in a.rows if row["device"] == "cuda"])
    assert Difference.of(only_cuda, b) == Difference((-9.0, -9.0, -9.0), across=True)
    assert str(Difference.of(only_cuda, b)).endswith("†")


def test_a_search_among_diverged_runs_goes_down() -> None:
    """A loss above that before training is no minimum, even between worse ones."""

    def execute(run: Run) -> dict[str, float]:
        number = study.rung_number(run.lr)
        return {"train_loss": 5.0 + (number % 3) if number > -12 else 1 + abs(number + 14) / 10}

    assert plan.best_rung(replace(RUN, method="SGD"), execute) == -14


def test_a_transferred_rate_is_compared_with_the_best_one() -> None:
    """The search in another shape begins at the source's rate and goes on to an optimum that is far off."""
    tried: list[Run] = []

    def execute(run: Run) -> dict[str, float]:
        tried.append(run)
        best = -8 if run.r == plan.SOURCE["r"] else -11
        return {"train_loss": 1 + abs(study.rung_number(run.lr) - best) / 10}

    shape = replace(RUN, method="AdamW", r=32, layers=plan.HALF)
    plan.transfer(shape, execute)
    assert {study.rung_number(run.lr) for run in tried if run.r == 32} == {-7, -8, -9, -10, -11, -12}


def test_a_run_without_hope_stops(sources: bench.Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some steps above the loss at which a run counts as diverged."""
    monkeypatch.setattr(runs, "PATIENCE", 2)
    monkeypatch.setattr(tasks.Language, "evaluate", lambda *_: pytest.fail("evaluated"))
    assert bench.execute(RUN, sources)["train_loss"] == float("inf")  # at random: 4.85


def test_the_page_shows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and markers of the committed page are those of the committed rows."""
    monkeypatch.setattr(report, "figures", lambda *_: [])
    rows = read_rows(bench.RESULTS / "language_model.csv")
    assert tuple(rows[0]) == runs_file(tmp_path / "none.csv", None).columns
    text = report.DOCUMENT.read_text()
    page = tmp_path / "page.md"
    page.write_text(text)
    report.write(rows, page, tmp_path)
    assert page.read_text() == text


def test_the_demo_wants_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo_lm.main(["--data", str(tmp_path), "--output", str(tmp_path)])
    assert "mawps.train.jsonl is not there" in capsys.readouterr().err
