# make setup | demo | test | test-fast | lint | types. PYTHON picks the interpreter the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One stamp per set of requirements: nothing is installed again until a file changes.
STAMP := $(VENV)/.setup-stamp
DEV_STAMP := $(VENV)/.dev-stamp

.PHONY: setup setup-dev demo test test-fast lint types format clean

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

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup-dev
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest tests

# Lint and every test that is not marked slow.
test-fast: lint
	$(BIN)/python -m pytest tests -m "not slow"

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
