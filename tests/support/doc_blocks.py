"""The code blocks of README and docs, and what each kind of them has to stand (`tests/project/test_docs.py`)."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "configs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
SHARDED = "ep_size=8", "ep_size=2"  # what the pages show, and what the two ranks of the tests can do


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page on which it begins."""

    language: str
    text: str
    line: int


@contextmanager
def chdir(folder: str | Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [Block(m.group(1), m.group(2), text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, divided at `;` and `&&`, without comments."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    words = [shlex.split(line, comments=True, posix=False) for line in lines]
    parts = [part for line in words for part in re.split(r"(?:^|\s)(?:;|&&)\s|;\s", " ".join(line))]
    return [part.strip() for part in parts if part.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Python: run on two ranks
# ---------------------------------------------------------------------------------------------------------------------


def execute(page: str, sources: list[tuple[int, str]], folder: str) -> None:
    """Runs the Python blocks of a page, one after the other, with the names that the page takes for granted."""
    import torch.distributed as dist
    from peft import get_peft_model

    from ds_moelora import MoELoRAConfig
    from tests.support.launch_support import tiny_model

    with chdir(folder):
        if dist.get_rank() == 0:
            tiny_model(Path("meta-llama/Llama-3.2-1B"))  # found before the hub is asked
            Path("ds_config.json").write_text(json.dumps(deepspeed_config()))
        dist.barrier()
        known: dict[str, Any] = {}
        for line, source in sources:
            source = source.replace(*SHARDED)
            # Rank 0 writes what all then load.
            source = re.sub(r"^(?=.*from_pretrained\(base_model)", "torch.distributed.barrier()\n", source, flags=re.M)
            model = _llama()
            if "get_peft_model" not in source:
                config = MoELoRAConfig(target_modules=["q_proj"], num_experts=4, r=2, task_type="CAUSAL_LM")
                model = get_peft_model(model, config)
            params = [p for p in model.parameters() if p.requires_grad]
            known |= {"model": model, "base_model": _llama(), "params": params, "batches": _batches()}
            known |= {"config": deepspeed_config(), "rows": [{k: v[0] for k, v in b.items()} for b in _batches()]}
            if "engine" in source and "deepspeed.initialize" not in source:
                known["engine"] = _engine(model, params)
                known["engine"].save_checkpoint("saved")
            known |= {"folder": "saved", **_one_layer()}
            exec(compile(source, f"{page}:{line}", "exec"), known)
            dist.barrier()


def deepspeed_config() -> dict[str, Any]:
    """A DeepSpeed config without "auto": ZeRO-2 with our optimizer."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "GateRiemannianAdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 1.0,
    }


def _one_layer() -> dict[str, Any]:
    """The parts of an exported layer: its input and router, and what the base, the experts and the rest do."""
    import torch

    x, router = torch.randn(5, 8), torch.randn(4, 8)
    layer = {"torch": torch, "x": x, "router": router, "E": 4, "top_k": 2, "temperature": 1.0}
    return layer | dict.fromkeys(("base", "expert_i", "always"), torch.nn.Linear(8, 8))


def _engine(model: Any, params: list[Any]) -> Any:
    """An engine with DeepSpeed's own TensorBoard switched on."""
    import deepspeed

    board = {"enabled": True, "output_path": "runs", "job_name": "docs"}
    config = {**deepspeed_config(), "tensorboard": board}
    return deepspeed.initialize(model=model, model_parameters=params, config=config)[0]


def _llama() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")


def _batches() -> list[dict[str, Any]]:
    import torch

    tokens = torch.arange(1, 9).view(1, 8)
    return [{"input_ids": tokens + shift, "labels": tokens + shift} for shift in range(2)]


# ---------------------------------------------------------------------------------------------------------------------
# Shell: every command has to be one of these
# ---------------------------------------------------------------------------------------------------------------------


def parse_launcher(arguments: list[str], demo_defaults: dict[str, Any]) -> None:
    """Raises unless `launch/train.py` takes these flags."""
    from launch.checks.arguments import parse_arguments

    parse_arguments(arguments, demo_defaults)


def _after(words: list[str], script: str) -> list[str]:
    return words[next(i for i, word in enumerate(words) if word.endswith(script)) + 1 :]


def _check_training(words: list[str]) -> None:
    from launch.demo.defaults import DEFAULTS

    with chdir(ROOT):
        arguments = [word for word in _after(words, "launch/train.py") if word != "..."]
        if "recipe.yaml" not in arguments:  # shown on the page itself
            parse_launcher(arguments, DEFAULTS)


def _check_command(words: list[str]) -> None:
    """`ds-moelora COMMAND ...`, or `python -m ds_moelora COMMAND ...`; of the launcher's programs the flags."""
    from ds_moelora.cli import build_parser
    from launch import evaluate, generate
    from launch.checks.arguments import read_flags
    from launch.data.preview import read_options

    first = next(i for i, word in enumerate(words) if word in ("ds-moelora", "ds_moelora"))
    command, *flags = words[first + 1 :]
    with chdir(ROOT):
        if "|" in command:  # several at once, in prose
            return
        if command in ("train", "preview"):
            _check_flags(read_options(flags)[1] if command == "preview" else flags)
        elif command == "evaluate":
            evaluate.read_arguments(flags)
        elif command == "generate":
            read_flags((generate.GenerationArguments,), flags, command)
        else:
            build_parser().parse_args([command, *flags])


def _check_flags(words: list[str]) -> None:
    """Flags of the launcher by themselves."""
    parse_launcher(words if "--model_name_or_path" in words else ["--model_name_or_path", "base", *words], {})


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert words[1] in targets, f"there is no make target {words[1]!r}"


def _script(words: list[str]) -> str | None:
    """The file that a command runs, of those of this repository."""
    for i, word in enumerate(words):
        if word == "-m" and find_spec(words[i + 1].partition(".")[0]) and (ROOT / words[i + 1].split(".")[0]).is_dir():
            return words[i + 1].replace(".", "/") + ".py"
        if re.fullmatch(r"(\./)?(benchmarks|launch|tests|docs)/[\w/]+\.(py|sh|sbatch)", word):
            return word.removeprefix("./")
    return None


def _check_script(words: list[str]) -> None:
    """The script is there, and knows the flags: they stand in its source, or in that of a sibling it imports."""
    script = _script(words)
    assert script is not None
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    text = path.read_text()
    for name in re.findall(r"^from (\w+(?:\.\w+)*) import|^import (\w+(?:\.\w+)+)", text, re.M):
        sibling = ROOT / ((name[0] or name[1]).replace(".", "/") + ".py")
        text += sibling.read_text() if sibling.is_file() else ""
    position = next(i for i, word in enumerate(words) if word.replace(".", "/") in script or word.endswith(script))
    for flag in [word.split("=")[0] for word in words[position + 1 :] if word.startswith("--") and word != "--"]:
        spelled = flag.lstrip("-").replace("-", "_")
        assert flag in text or re.search(rf"\b{spelled}\b", text), f"{script} does not know {flag}"


def _check_program(words: list[str]) -> None:
    """A program of somebody else's: nothing of ours can be wrong about it but its presence in this list."""


PROGRAMS = (
    ".",
    "python3",
    "pip",
    "pytest",
    "tensorboard",
    "mkdocs",
    "apt-get",
    "export",
    "cd",
    "git",
    "ssh-keyscan",
    "ssh",
    "ssh-copy-id",
)
RULES: list[tuple[Callable[[list[str]], bool], Callable[[list[str]], None]]] = [
    (lambda words: any(word.endswith("launch/train.py") for word in words), _check_training),
    (lambda words: words[0].startswith("--"), _check_flags),
    (lambda words: words[0] == "ds-moelora" or ("ds_moelora" in words and "-m" in words), _check_command),
    (lambda words: words[0] == "make", _check_make),
    (lambda words: _script(words) is not None, _check_script),
    (lambda words: words[0] in PROGRAMS or words[:3] == ["python", "-m", "pip"], _check_program),
]


# ---------------------------------------------------------------------------------------------------------------------
# Configs and messages
# ---------------------------------------------------------------------------------------------------------------------


def check_optimizer_block(block: dict[str, Any], optimizers: Any) -> None:
    """Raises unless the optimizer exists and takes these parameters."""
    known = inspect.signature(getattr(optimizers, block["type"])).parameters
    assert set(block.get("params", {})) <= set(known), block


def squeeze(text: str) -> str:
    """A message without its values (`…`) and spaces: what a quotation and the source have in common."""
    return re.sub(r"[…\s]+", "", text)


def messages_in_sources() -> list[str]:
    """All string constants of package and launcher; f-strings without their values."""
    found = []
    for path in [*(ROOT / "ds_moelora").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(squeeze(node.value))
            elif isinstance(node, ast.JoinedStr):
                constants = [v.value for v in node.values if isinstance(v, ast.Constant)]
                found.append(squeeze("".join(constants)))
    return found
