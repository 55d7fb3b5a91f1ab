# Two commands on a fresh machine: `make quickstart` and `make test`. Both create the environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test test-all test-faults lint clean

quickstart: $(READY)
	$(BIN)/orpo quickstart

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not faults"

test-all: $(READY) lint
	$(BIN)/python -m pytest -m "not faults"

# the full counts of tests/faults: hours; the ordinary suite runs a few of each
test-faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch first and by its exact version, so that nothing after it chooses another build
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
