"""A virtual environment for each front end, in build/front-ends/environments.

torch is pinned, and so nothing that a front end wants can bring another one with CUDA (on a machine without GPUs take
torch's CPU build: `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`). Extensions that PyPI has for CUDA alone
do not load beside it, and are taken out again; none of them is needed for text. An environment that is there is kept.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "front-ends" / "environments"
TORCH = "torch==2.13.0"
COMMON = ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "deepspeed==0.19.8", "rich")


@dataclass(frozen=True)
class Environment:
    """What is installed.

    Args:
        requirements: with their dependencies. alone: without them. without: uninstalled again.
        files: patterns of files below site-packages that are removed.
    """

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


ENVIRONMENTS = {
    "trl": Environment((*COMMON, "datasets==5.2.0", "trl==1.16.0", "lm_eval==0.4.13")),
    "llamafactory": Environment(
        ("llamafactory==0.9.5", "deepspeed==0.18.4", "rich"),
        without=("torchvision",),
        files=("torchaudio/lib/*.so",),  # torchaudio, which LLaMA-Factory imports, does without
    ),
    "swift": Environment(("ms-swift==4.6.0", "deepspeed==0.19.8", "rich")),
    # Its own pins, without what needs a GPU (xformers, liger-kernel, fla) or is not used here (gradio, modal). It asks
    # for DeepSpeed below 0.19; but 0.18.9 gathers into a buffer with autograd's history at stages 1 and 2, for AdamW
    # too, and gloo of torch 2.13 refuses that.
    "axolotl": Environment(
        (
            *("packaging==26.0", "huggingface_hub==1.17.0", "peft==0.20.0", "tokenizers==0.23.1"),
            *("transformers==5.16.1", "accelerate==1.13.0", "datasets==4.8.4", "trl==1.9.0", "hf_xet==1.4.3"),
            *("kernels>=0.16.0,<0.17.0", "typing-extensions==4.15.0", "pydantic==2.12.5", "addict", "fire"),
            *("PyYAML==6.0.3", "requests", "einops", "colorama", "numba>=0.63.1,<1.0", "numpy>=2.1,<3.0"),
            *("typer==0.25.1", "evaluate==0.4.1", "scipy", "nvidia-ml-py==12.560.30", "art", "tensorboard"),
            *("python-dotenv==1.0.1", "zstandard==0.22.0", "fastcore", "langdetect==1.0.9", "immutabledict==4.2.0"),
            *("schedulefree==1.4.1", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6"),
            *(
                "posthog==6.7.11",
                "mistral-common==1.11.5",
                "sentencepiece",
                "wandb",
                "deepspeed==0.19.8",
                "rich",
            ),
        ),
        alone=("axolotl==0.19.0", "bitsandbytes==0.50.2", "torchao==0.17.0", "triton>=3.4.0,<3.8"),
    ),
    "lightning": Environment((*COMMON, "lightning==2.6.*")),
}


def build(name: str, folder: Path) -> None:
    """Makes the environment; a half-made one is made anew.

    Raises:
        subprocess.CalledProcessError: pip found no way.
    """
    wanted, ready = ENVIRONMENTS[name], folder / ".ready"
    if ready.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints]
    for words in (
        [*install, TORCH, "setuptools", "wheel", "packaging", "ninja", "numpy"],  # DeepSpeed's setup asks for them
        [*install, *wanted.requirements],
        [*install, "--no-deps", *wanted.alone] if wanted.alone else [],
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", *wanted.without] if wanted.without else [],
        [*install, "--no-deps", "--no-build-isolation", "--editable", ROOT],
    ):
        if words:
            subprocess.run(words, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for pattern in wanted.files:
        for path in packages.glob(pattern):
            path.unlink()
    ready.touch()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*ENVIRONMENTS, []], default=[], metavar="NAME")
    for name in parser.parse_args().names or ENVIRONMENTS:
        print(f"The environment of {name}", flush=True)
        build(name, FOLDER / name)
