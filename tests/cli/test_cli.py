"""`python -m ds_moelora`: output that scripts can read, errors of one line, and no need of DeepSpeed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import ds_moelora
import ds_moelora_command as launcher
from ds_moelora import plugin
from ds_moelora.cli import COMMANDS, main
from ds_moelora.cli.plan_report import CONFIGS
from ds_moelora.planner import model

ROOT = Path(ds_moelora.__file__).parent.parent
SCALING = ROOT / "docs/scaling.md"
CONFIG = ROOT / "benchmarks/model_configs/llama3_8b.json"
PLAN = ["plan", "--model-config", str(CONFIG), "--num-experts", "64", "--r", "64", "--gpus", "64"]


def changed(*flags: str) -> list[str]:
    return [*PLAN, *flags]


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(changed("--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"]["adapter"]["num_experts"] == 64
    assert re.match(r"deepspeed --num_nodes 8 --hostfile HOSTFILE --num_gpus 8 launch/train.py", plan["command"])
    assert plan["best"] in plan["ways"]
    assert plan["best"]["fits"]
    assert plan["best"]["memory_bytes"] <= 72e9
    assert plan["best"]["sent_bytes"] == pytest.approx(sum(t["sent"] for t in plan["best"]["transfers"]))


def test_plan_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(changed("--all")) == 0
    text = capsys.readouterr().out
    for part in ("40 fit; shown 40", "optimizer states", "all_reduce", "Choose stage", "MoELoRAConfig(num_experts=64"):
        assert part in text
    assert max(map(len, text.splitlines())) < 180


def test_every_config_that_a_plan_names_is_there_and_is_what_it_says() -> None:
    types = {("adamw", True): "GateRiemannianAdamW", ("adamw", False): "AdamW", ("sgd", True): "GateRiemannianSGD"}
    for (*kind, stage), name in CONFIGS.items():
        for file in [name, *(["zero2_ep"] if name == "zero2" else [])]:
            config = json.loads((ROOT / "configs" / f"{file}.json").read_text())
            assert config["zero_optimization"]["stage"] == stage
            assert config["optimizer"]["type"] == types[tuple(kind)]


def test_a_plan_without_a_config_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(changed("--plain-optimizer", "--optimizer", "sgd")) == 0
    assert "No config comes with plain sgd at stage" in capsys.readouterr().out


def test_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num-experts", "8", "256", "--gpus", "8", "64"]
    assert main(changed(*sizes, "--format", "markdown")) == 0
    title, _, header, rule, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "Per GPU and step, h100, nvlink4 in a node, infiniband-400 between nodes:"
    assert header.startswith("| E | r | GPUs | choose |")
    assert set(rule) <= set("|-: ")
    assert [row.split(" | ")[:3] for row in rows] == [[f"| {e}", "64", g] for e in ("8", "256") for g in ("8", "64")]
    assert "does not fit; 16 GPUs do" in rows[2]
    assert main(changed(*sizes, "--json")) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [("error" in entry) for entry in entries] == [False, False, True, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-experts", "256", "--gpus", "8"], "nothing fits on 8 GPUs"),
        (["--target-modules", "q_prj"], "Did you mean"),
        (["--target-modules", "x.*y"], "not found in the base model"),
        (["--model-config", "no/where/at/all"], "no/where/at/all is not there"),
        (["--model-config", "no/where"], "Get https://huggingface.co/no/where/resolve/main/config.json where"),
        (["--calibration", "nowhere"], "calibration nowhere cannot be read"),
        (["--gpus", "12"], "not a multiple of gpus_per_node=8"),
        (["--inter-bandwidth", "-3"], "inter=-3000000000.0 must be > 0"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # or the hub is asked many times
    assert main(changed(*flags)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err
    with pytest.raises(ValueError, match=r"\w"):
        main(changed(*flags, "--debug"))


@pytest.mark.parametrize("argv", [[], ["abacus"], PLAN[:-2], changed("--gpu", "abacus"), changed("--num-exp", "3")])
def test_wrong_flags_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--help" in line


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def fails(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise OSError("Name or service not known")

    monkeypatch.setattr(model, "get_hf_file_metadata", fails)
    monkeypatch.setattr(model, "hf_hub_download", lambda *_: asked.append("again"))
    assert main(changed("--model-config", "no/where")) == 2
    assert "(Name or service not known). Get https://huggingface.co/no/where/" in capsys.readouterr().err
    assert len(asked) == 1


def test_the_unforeseen_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("ds_moelora.cli.plan.describe_model", fail)
    assert main(PLAN) == 1
    assert capsys.readouterr().err == "error: RuntimeError: two lines (--debug shows where)\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"ds-moelora {command}" in capsys.readouterr().out


def test_as_a_program_without_deepspeed(tmp_path: Path) -> None:
    """The console script. DeepSpeed prints to stdout when imported; here its import fails."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text("raise RuntimeError('deepspeed was imported')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = tmp_path / "bin" / plugin.COMMAND
    script.parent.mkdir()
    script.write_text("import sys\nfrom ds_moelora_command import main\nsys.exit(main())\n")  # as pip writes it
    command = [sys.executable, str(script), *changed("--json")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["best"]["fits"]


@pytest.mark.parametrize(
    ("argv", "typed", "is_command"),
    [
        (["/x/bin/ds-moelora", "plan"], ["python", "/x/bin/ds-moelora", "plan"], True),
        (["-m", "plan"], ["python", "-m", "ds_moelora", "plan"], True),
        (["-m"], ["python", "-m", "pytest", "ds_moelora"], False),
        (["-c"], ["python", "-c", "import ds_moelora"], False),
        (["train.py"], ["python", "train.py", "ds-moelora"], False),
        ([], ["python"], False),
    ],
)
def test_what_starts_as_a_command(
    argv: list[str], typed: list[str], is_command: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert plugin._starts_as_command() == is_command


DOCUMENTED = re.findall(
    r"^    python -m ds_moelora (plan (?:\\\n|[^\n])*)\n\n<!-- output -->\n(.*?)<!-- end -->",
    SCALING.read_text(),
    re.M | re.S,
)


@pytest.mark.parametrize(("command", "shown"), DOCUMENTED, ids=range(len(DOCUMENTED)))
def test_documented_output_is_what_the_command_prints(
    command: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_the_launchers_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device: the program itself. Several, or a flag of DeepSpeed's launcher: that one, without its lines."""
    import torch

    file = launcher.script("train.py")
    assert file == ROOT / "launch" / "train.py"
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert launcher.command_line("train", file, ["--r", "4"]) == [sys.executable, str(file), "--r", "4"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    found = launcher.command_line(
        "train", file, ["--num_gpus", "2", "--r", "4", "--include_num_input_tokens_seen", "no"]
    )
    assert found == [*runner, "--num_gpus=2", str(file), "--r", "4", "--include_num_input_tokens_seen", "no"]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    assert launcher.command_line("train", file, []) == [*runner, str(file)]
    assert launcher.command_line("train", file, ["--help"]) == [sys.executable, str(file), "--help"]
    assert launcher.command_line("evaluate", file, []) == [sys.executable, str(file)]
