# `make run` and `make test` are all that a fresh machine needs: Python 3.11+, git, make.
PYTHON ?= python3
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake
# Kernels are also compiled with the newest Triton, ahead of the one that torch names (tests/kernels).
NEWEST_TRITON := 3.9.0
# Two tests beside each other, each on its share of the cores (tests/conftest.py).
BESIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: run setup test test-fast test-slow test-faults lint format bench-train bench-fp8 bench-dispatch bench-pipeline bench-checkpoint bench-convert bench-tokenize bench-gpu bench-overhead bench-seeds

run: setup
	$(SNAKEMAKE)

setup: .venv/installed

.venv/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headrace needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	test "$$(uname -s)" != Linux || $(BIN)/pip install --quiet --no-deps --target .venv/triton-newest --upgrade triton==$(NEWEST_TRITON)
	touch $@

test: setup
	$(BIN)/pytest $(BESIDE) -m "not alone and not slow and not faults"
	$(BIN)/pytest -m "alone and not slow and not faults"

test-fast: setup
	$(BIN)/pytest $(BESIDE) -m "not workflow and not browser and not alone and not slow and not faults"

test-slow: setup
	$(BIN)/pytest $(BESIDE) -m "slow and not alone and not faults"
	$(BIN)/pytest -m "slow and alone and not faults"

# They are in few files: so only these are collected, and tests are shared out one by one.
FAULTS = $(shell grep -rl --include='test_*.py' 'mark\.faults' tests)
test-faults: setup
	$(BIN)/pytest -rs --numprocesses 2 -m "faults and not alone" $(FAULTS)
	$(BIN)/pytest -rs -m "faults and alone" $(FAULTS)

.PHONY: test-scale
test-scale: setup
	$(BIN)/python tests/scale/full.py

.PHONY: test-faults-full soak
test-faults-full: setup
	$(BIN)/python tests/faults/full.py

soak: setup
	$(BIN)/python benchmarks/soak.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(SNAKEMAKE) --lint --config experiment=tiny

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile workflow

bench-train: setup
	$(BIN)/python benchmarks/train.py

bench-seeds: setup
	$(BIN)/python benchmarks/seeds.py

bench-overhead: setup
	$(BIN)/python benchmarks/overhead.py

bench-fp8: setup
	$(BIN)/python benchmarks/fp8.py

bench-dispatch: setup
	$(BIN)/python benchmarks/dispatch.py

bench-pipeline: setup
	$(BIN)/python benchmarks/pipeline.py

bench-tokenize: setup
	$(BIN)/python benchmarks/tokenization.py

bench-convert: setup
	$(BIN)/python benchmarks/conversion.py

bench-checkpoint: setup
	$(BIN)/python benchmarks/checkpoint.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py
