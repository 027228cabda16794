# make demo: prune the built-in model with every method and print the table.
# make test: the CPU test suite.   make test-slow: what takes longer, among it every model family, kills and fuzzing.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# One thread a worker: the tensors are small, and the workers take all cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadscope

.PHONY: demo test test-slow check clean

demo: .venv/base
	$(BIN)/pst compare demo -o runs/demo --overwrite --epochs 1

test: .venv/dev
	$(PYTEST) -m "not slow"

test-slow: .venv/dev
	$(PYTEST) -m slow

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/base
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
