# make demo   the whole pipeline on the embedded model, two ranks, no network      make test    all tests
# make check  ruff and mypy                                                          make bench   timings (BENCHMARKS.md)
# Each creates .venv and installs what it needs; a second run reuses it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DS_BUILD_OPS := 0
export PYTHONSAFEPATH := 1

.PHONY: demo test check bench clean

demo: $(VENV)/.run
	$(BIN)/megatron-lowbit demo

bench: $(VENV)/.run
	$(BIN)/megatron-lowbit benchmark

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "megatron-lowbit needs Python 3.11 or newer; set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed,megatron,wandb,test]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build *.egg-info
