# `make demo` runs the main job on the embedded default; `make test` passes the tests. Both create .venv themselves.
# With DEEPSPEED=<version>, every target uses an environment of its own that differs in that version alone:
# `make conformance DEEPSPEED=0.17.6` runs there what compares the optimizers with the reference.
PYTHON ?= python3
DEEPSPEED ?=
VENV := .venv$(addprefix -deepspeed-,$(DEEPSPEED))
BIN := $(CURDIR)/$(VENV)/bin
RANKS ?= 2
PYTEST_ARGS ?=

# DeepSpeed compiles its CPU collectives with the `ninja` of the virtual environment: it must be on PATH.
export PATH := $(BIN):$(PATH)
# torch keeps one build of them per user: two versions of DeepSpeed would rebuild it in turn, under each other's feet.
ifneq ($(DEEPSPEED),)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
endif

.PHONY: demo test test-multinode conformance bench bench-gpu lint format clean

demo: $(VENV)/.ready
	OMP_NUM_THREADS=1 deepspeed --num_gpus $(RANKS) launch/train.py --deepspeed configs/zero2.json --overwrite_output_dir

test: $(VENV)/.ready
	python -m pytest $(PYTEST_ARGS)

# Every launcher on two hosts out of network namespaces: root, and openssh-server, pdsh, openmpi-bin, iproute2.
test-multinode: $(VENV)/.ready
	python -m pytest tests/multinode tests/test_multinode_launch.py tests/test_hosts.py tests/test_nodes.py -ra $(PYTEST_ARGS)

conformance: $(VENV)/.ready
	python -m pytest tests/conformance tests/test_zero_exactness.py $(PYTEST_ARGS)

# A short form of every benchmark, under 10 minutes, and which ratios moved from benchmarks/results/.
bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 python -m benchmarks.compare

# Needs torch, peft and a CUDA device; neither network nor DeepSpeed, and no virtual environment of its own.
bench-gpu:
	$(PYTHON) -m benchmarks.bench_gpu

lint: $(VENV)/.ready
	ruff check .
	ruff format --check .
	mypy
	shellcheck launch/*.sh launch/*.sbatch tests/multinode/standin/scontrol

format: $(VENV)/.ready
	ruff check --fix .
	ruff format .

# torch first: DeepSpeed's setup reads its version, and a later range then finds it satisfied.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	sed '$(if $(DEEPSPEED),s/^deepspeed==.*/deepspeed==$(DEEPSPEED)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@echo "Compiling DeepSpeed's CPU collectives (about a minute, once per machine)"
	$(BIN)/python -c "from deepspeed.accelerator import get_accelerator as a; \
	  a()._name == 'cpu' and a().create_op_builder('ShareMemCommBuilder').load()" > /dev/null
	touch $@

clean:
	rm -rf .venv .venv-deepspeed-* .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
