# make demo: prune the built-in model with every method and print the table.   make test: the CPU test suite.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check clean

demo: .venv/base
	$(BIN)/pst compare demo -o runs/demo --overwrite --epochs 1

test: .venv/dev
	$(BIN)/python -m pytest

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
