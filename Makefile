# make setup | demo | test | test-fast | lint. PYTHON is the interpreter of the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One stamp per set of requirements: nothing is installed again until a file changes.
STAMP := $(VENV)/.setup-stamp
DEV_STAMP := $(VENV)/.dev-stamp

.PHONY: setup setup-dev demo test test-fast lint format clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup-dev: $(DEV_STAMP)

$(DEV_STAMP): requirements/dev.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements/dev.txt
	touch $@

demo: setup
	$(BIN)/python -m launch.demo --workdir=runs/demo

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Worker processes of pytest; 0 runs all tests in one process.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest tests --numprocesses=$(WORKERS) --dist=worksteal

test: lint
	$(PYTEST)

# Lint, types and every test that is not marked slow.
test-fast: lint
	$(PYTEST) -m "not slow"

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
