# A virtual environment in .venv, made on first use and renewed when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt

.PHONY: help demo test check lint mypy pyright layers fast soak fuzz clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo    install into $(VENV) and run a workflow in a worker process"
	@echo "make test    install the development tools too, then run the checks and all tests"
	@echo "make check   ruff, mypy, pyright, import-linter"
	@echo "make fast    the tests, without those marked slow or comfyui"
	@echo "make soak    ten thousand jobs, a worker killed every hundred (LEGION_SOAK_JOBS=...)"
	@echo "make fuzz    a minute of fuzzing for each decoder (LEGION_FUZZ_SECONDS=...)"
	@echo "make clean   remove $(VENV) and what builds and checks left behind"
	@echo "PYTHON=...   the Python (3.10 or later) to make $(VENV) with, instead of python3"

demo: $(VENV)/installed
	$(BIN)/legion demo

test: check
	$(BIN)/python -m pytest

# `make -k check` goes on past a check that fails.
check: lint mypy pyright layers

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: $(VENV)/installed-dev
	$(BIN)/mypy

pyright: $(VENV)/installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(VENV)/installed-dev
	$(BIN)/lint-imports

fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -x -q -m "not slow and not comfyui"

soak: $(VENV)/installed-dev
	$(BIN)/python -m tests.reliability.soak

fuzz: $(VENV)/installed-dev
	$(BIN)/python -m tests.reliability.fuzz

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Legion needs Python 3.10 or later: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable ".[dev]"
	@touch $@
