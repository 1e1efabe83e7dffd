"""Nothing that comes after the save fails a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import TrainerControl, TrainingArguments
from transformers.integrations import TensorBoardCallback

from launch.checkpoint import saving
from launch.checks.errors import UserError
from launch.training import finishing, report
from launch.training.finishing import Curves, HubUpload, guard_curves, not_fatal


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with not_fatal("its summary", "outputs/lr[/1e-3]"):
        raise OSError(28, "No space\nleft on device")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "saved in outputs/lr[/1e-3]; its summary is missing: OSError: [Errno 28] No space left on device" in said


def test_markup_in_paths(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets are rich's markup: a closing tag alone is an error, others vanish."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = "outputs/lr[/1e-3] run[bold]x :smile:"
    summary: dict[str, Any] = {"trainable_parameters": 1, "all_parameters": 2, "optimizer": "AdamW", "steps": 1,
                               "world_size": 1, "seconds": 1.0, "tokens_per_second": None, "first_loss": 1.0,
                               "last_loss": 1.0, "eval": {}, "adapter": folder, "checkpoints": [f"{folder}/c"],
                               "tensorboard": f"tensorboard --logdir {folder}"}  # fmt: skip
    report.print_summary(summary, Path(folder) / "train_summary.json")
    assert capsys.readouterr().out.count(folder) == 4


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_that_fails_after_the_save(world: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one process a line; of several the others wait in it, so that all must end."""

    def evaluate() -> dict[str, float]:
        raise RuntimeError("out of memory")

    state = SimpleNamespace(best_global_step=None, global_step=3, log_history=[{"step": 3, "loss": 1.0}])
    args = SimpleNamespace(world_size=world, output_dir="outputs/x", load_best_model_at_end=False)
    trainer = SimpleNamespace(state=state, args=args, eval_dataset=[1], evaluate=evaluate)
    if world == 1:
        assert finishing.final_scores(trainer) == {}
        assert "saved in outputs/x; its evaluation (launch/evaluate.py" in capsys.readouterr().out
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            finishing.final_scores(trainer)
    state.log_history.append({"step": 3, "eval_loss": 2.0})
    assert finishing.final_scores(trainer) == {"eval_loss": 2.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_curves_end_at_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever call meets the error; those after it do nothing."""
    curves = Curves(log_dir=str(tmp_path))
    curves.add_scalar("loss", 1.0, 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    curves._writer.file_writer.event_writer._async_writer._writer.write = full
    for step in range(2, 200):
        curves.add_scalar("loss", 1.0, step)
        curves.flush()
    curves.file_writer.add_summary(None)
    curves.close()
    said = capsys.readouterr().out
    assert said.count(str(tmp_path)) == 1
    assert "No space left on device). Training goes on without curves." in said


def test_curves_that_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    callback = TensorBoardCallback()
    handler, args = SimpleNamespace(callbacks=[callback]), SimpleNamespace(resume_from_checkpoint=None)
    guard_curves(SimpleNamespace(callback_handler=handler, args=args))
    args = TrainingArguments(output_dir=str(tmp_path / "file"), report_to=[])
    state = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False, global_step=1)
    callback.on_train_begin(args, state, TrainerControl())
    callback.on_log(args, state, TrainerControl(), logs={"loss": 1.0})
    callback.on_train_end(args, state, TrainerControl())
    callback.on_log(args, state, TrainerControl(), logs={"eval_loss": 1.0})  # makes a writer of its own
    assert "cannot be written" in capsys.readouterr().out


class Hub:
    """What `HfApi` is asked to do."""

    def __init__(self) -> None:
        self.uploads: list[dict[str, Any]] = []
        self.refuses = False

    def __call__(self, token: str | None) -> Hub:
        self.token = token
        return self

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        if self.refuses:
            raise ConnectionError(f"401 for {name}")
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, **kwargs: Any) -> None:
        if self.refuses:
            raise ConnectionError("reset")
        self.uploads.append(kwargs)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(finishing, "HfApi", made)
    return made


def training(tmp_path: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_token="t" * 8, report_to=[], **changes)


def test_upload(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end, and after checkpoints with the default strategy; transformers' own upload is off."""
    args, state = training(tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=4)
    upload = HubUpload(args)
    assert not args.push_to_hub
    upload.on_train_begin(args, state, TrainerControl())
    assert hub.token == "t" * 8
    (tmp_path / "checkpoint-4").mkdir()
    upload.on_save(args, state, TrainerControl())
    upload.finish()
    assert [made["folder_path"].name for made in hub.uploads] == ["checkpoint-4", tmp_path.name]
    assert all({"training_args.bin", "checkpoint-*"} <= {*made["ignore_patterns"]} for made in hub.uploads)
    hub.refuses = True
    upload.finish()
    assert f"the upload to me/{tmp_path.name} is missing: ConnectionError: reset" in capsys.readouterr().out


def test_a_hub_that_refuses_is_found_before_training(tmp_path: Path, hub: Hub) -> None:
    hub.refuses = True
    args = training(tmp_path, hub_model_id="mixture", hub_strategy="end")
    upload = HubUpload(args)
    with pytest.raises(UserError, match="--push_to_hub: mixture cannot be made on the hub: ConnectionError: 401"):
        upload.on_train_begin(args, SimpleNamespace(is_world_process_zero=True), TrainerControl())
    upload.on_train_begin(args, SimpleNamespace(is_world_process_zero=False), TrainerControl())
    upload.finish()  # a rank that made no repository
    assert hub.uploads == []


def test_a_disk_that_is_full_for_safetensors_alone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files still fit, and safetensors raises an error of its own, which is no OSError."""

    def write() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    trainer: Any = SimpleNamespace(is_world_process_zero=lambda: True, state=SimpleNamespace(global_step=3))
    with pytest.raises(UserError, match=r"could not be saved: .*No space left.* Make room"):
        saving.CheckpointedTrainer._save_safely(trainer, tmp_path / "model", tmp_path, write)
