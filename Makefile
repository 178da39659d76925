# Everything runs in .venv, which `make` builds by itself from constraints.txt, the verified set of versions.
# The package index is whatever pip is configured to use. For another torch build: make install TORCH=torch==2.13.0+cu130

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
TORCH ?=
WORKSPACE ?= workspace/demo
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Waiting threads sleep: where cores are shared, spinning ones make small matrices tens of times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test lint format bench faults ui clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP) ## make the virtual environment and install driftrec into it

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "no Python 3.11 or newer found; install one, or name it: make install PYTHON=/path/to/python" >&2; exit 2; \
	  fi; \
	  "$$python" -m venv $(VENV); \
	fi
	@sed -e '$(if $(TORCH),/^torch==/d)' constraints.txt > $(VENV)/constraints.txt
	@echo "installing into $(VENV): about 2 GB, some minutes"
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt $(TORCH) -e '.[dev]'
	@touch $@

demo: install ## train and compare on a generated shop log, a few minutes
	$(BIN)/driftrec demo

test: lint ## lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: install ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: install ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## run the short benchmarks, under 20 minutes, and refresh docs/results.md's table
	@$(BIN)/python -m benchmarks.bench

faults: install ## inject every fault of docs/reliability.md, about three quarters of an hour
	$(BIN)/python -m benchmarks.faults

ui: install ## Prefect on PREFECT_PORT and MLflow on MLFLOW_PORT, this machine only, for WORKSPACE
	@$(BIN)/driftrec ui --workspace "$(WORKSPACE)" --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

clean: ## remove the environment, caches and builds; workspaces and data stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find flows models regularizers stages tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
