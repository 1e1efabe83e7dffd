# `make demo` runs the main job on the embedded default; `make test` passes the tests. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
RANKS ?= 2
PYTEST_ARGS ?=

# DeepSpeed compiles its CPU collectives with the `ninja` of the virtual environment: it must be on PATH.
export PATH := $(BIN):$(PATH)

.PHONY: demo test lint format clean

demo: $(VENV)/.ready
	OMP_NUM_THREADS=1 deepspeed --num_gpus $(RANKS) launch/train.py --deepspeed configs/zero2.json --overwrite_output_dir

test: $(VENV)/.ready
	python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.ready
	ruff check .
	ruff format --check .
	mypy

format: $(VENV)/.ready
	ruff check --fix .
	ruff format .

# torch first: DeepSpeed's setup reads its version, and a later range then finds it satisfied.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo "Compiling DeepSpeed's CPU collectives (about a minute, once per machine)"
	$(BIN)/python -c "from deepspeed.accelerator import get_accelerator as a; \
	  a()._name == 'cpu' and a().create_op_builder('ShareMemCommBuilder').load()" > /dev/null
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
