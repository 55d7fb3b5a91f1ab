# Two commands on a fresh machine: `make quickstart` and `make test`. Both create the environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test test-all test-faults lint sbom audit lock clean

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

# what is installed, as a CycloneDX document; what is known to be wrong with it (asks the vulnerability database)
sbom: $(READY)
	$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install -q cyclonedx-bom pip-audit
	$(VENV)/audit/bin/cyclonedx-py environment --output-reproducible -o sbom.json $(BIN)/python

audit: sbom
	$(VENV)/audit/bin/pip-audit --strict -r constraints.txt --no-deps --disable-pip

# exact files: the versions of constraints.txt with the sha256 of each of their files, whatever index they come from
lock:
	$(PYTHON) -m venv $(VENV)/lock && $(VENV)/lock/bin/pip install -q pip-tools
	$(VENV)/lock/bin/pip-compile -q --generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
		--strip-extras --unsafe-package orpo-pipeline --extra dev -c constraints.txt -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV)
