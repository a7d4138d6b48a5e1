# `make run` and `make test` need Python 3.11 or 3.12 and nothing else; the environment is built on first use.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Flower and Ray: no telemetry, no update check, no dependency installation at run time.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: run test lint gpu data tables docs clean

run: $(READY)  ## the main job: federated DP-SGD by Flower's simulation, then the same recipe centralized
	@rm -rf runs/quickstart
	$(BIN)/fedsim verify quickstart --backend simulation --out runs/quickstart

test: lint  ## style, types and all tests
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(READY)  ## on a machine with a CUDA GPU: correctness, the owed measurements, in at most 25 minutes
	$(BIN)/python -m benchmarks.gpu

data: $(READY)  ## fetch the full Fashion-MNIST into data/
	$(BIN)/python -m fedsim.data.fetch --root data

tables: $(READY)  ## run all comparisons of configs/compare/ and bring their tables up to date
	$(BIN)/python -m benchmarks.compared

docs: $(READY)  ## write the site to build/site: all pages, search, the API from the docstrings
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
