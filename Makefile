# `make help` lists the targets. Each creates .venv and installs what it needs; a second run reuses it. On a machine
# without a GPU, TORCH_INDEX=URL takes torch from that package index first: PyTorch's for CPU builds spares gigabytes of
# CUDA.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
export DS_BUILD_OPS := 0
export PYTHONSAFEPATH := 1

.PHONY: help demo test test-quick test-all test-gpu test-megatron test-slurm slurm-packages browser-packages check bench clean

demo: $(VENV)/.run ## the whole pipeline on the embedded model, two ranks, no network
	$(BIN)/megatron-lowbit demo

help: ## this list
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / {printf "make %-17s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

bench: $(VENV)/.run ## timings (BENCHMARKS.md)
	$(BIN)/megatron-lowbit benchmark

# Three workers for two cores: ranks wait for one another, and three take 6 % less time than two.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup

test: $(VENV)/.test ## the tests but for the slow ones, on two cores
	$(PYTEST)

test-quick: $(VENV)/.test ## the tests that start no processes: a minute
	$(PYTEST) -m quick

test-all: $(VENV)/.test ## the slow tests too; MINUTES=50 begins none of them later
	$(PYTEST) -m "slow or not slow" $(if $(MINUTES),--minutes $(MINUTES) -rs)

test-gpu: $(VENV)/.test ## the tests of a GPU, on the first of this machine; without one they are skipped and say so
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest -rs -m gpu tests/kernels tests/launch

VERSION ?= 0.19.2
TESTS ?= tests/adapters/test_megatron*.py
test-megatron: $(VENV)/.test $(VENV)/megatron-core-$(VERSION) ## Megatron's tests on another VERSION=0.19.2 of it
	PYTHONPATH=$(abspath $(VENV)/megatron-core-$(VERSION)) $(PYTEST) $(TESTS)

# Beside the installed version and whatever Python it asks for: newer ones ask for 3.12, and run on 3.11. With what
# its coordinator and its server import.
$(VENV)/megatron-core-%: | $(VENV)/bin/python
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --ignore-requires-python --no-deps --target $@.part megatron-core==$*
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --target $@.part pyzmq quart hypercorn
	mv $@.part $@

test-slurm: slurm-packages $(VENV)/.test ## jobs on a real Slurm of two nodes, on this machine; installs it with apt as root
	$(BIN)/python -m pytest -m "slow or not slow" -s -rs tests/launch/test_slurm.py tests/launch/test_slurm_jobs.py

# Never fails: where Slurm cannot be installed its tests are skipped, and say why.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
slurm-packages: export DEBIAN_FRONTEND := noninteractive
slurm-packages: export PATH := $(PATH):/usr/sbin
slurm-packages: ## install Slurm, where that is possible
	@if command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; then exit; fi >/dev/null; \
	if ! command -v apt-get >/dev/null; then echo "no Slurm: there is no apt-get here"; exit; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "no Slurm: only root can install $(SLURM_PACKAGES)"; exit; fi; \
	install="apt-get update -qq; apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES)"; \
	if said=$$(timeout 300 sh -c "$$install" 2>&1 </dev/null); then echo "installed $(SLURM_PACKAGES)"; \
	else echo "no Slurm: apt-get: $$(echo "$$said" | tail -n 1)"; fi

# Never fails either: without a browser the page's tests are skipped, and say why.
BROWSER_PACKAGES := chromium chromium-driver
browser-packages: export DEBIAN_FRONTEND := noninteractive
browser-packages: ## install a headless Chromium for the tests of report.html, where that is possible
	@if command -v chromium && command -v chromedriver; then exit; fi >/dev/null; \
	if ! command -v apt-get >/dev/null; then echo "no browser: there is no apt-get here"; exit; fi; \
	if [ "$$(id -u)" != 0 ]; then echo "no browser: only root can install $(BROWSER_PACKAGES)"; exit; fi; \
	install="apt-get update -qq; apt-get install -y -qq --no-install-recommends $(BROWSER_PACKAGES)"; \
	if said=$$(timeout 600 sh -c "$$install" 2>&1 </dev/null); then echo "installed $(BROWSER_PACKAGES)"; \
	else echo "no browser: apt-get: $$(echo "$$said" | tail -n 1)"; fi

check: $(VENV)/.test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "megatron-lowbit needs Python 3.11 or newer; set PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --constraint constraints.txt --index-url $(TORCH_INDEX) torch)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed,megatron,wandb,test]'
	touch $@ $(VENV)/.run

clean: ## remove .venv and what was built
	rm -rf $(VENV) build *.egg-info
