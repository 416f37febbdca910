# `make serve` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL ?= nano
PORT ?= 8000

.PHONY: serve test test-all lint clean

serve: $(VENV)/.installed
	$(BIN)/hadal serve $(MODEL) --port $(PORT)

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(VENV)/.tested
	$(BIN)/python -m pytest -n auto -m "slow or not slow" $(ARGS)

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone, so that nothing later in the list can pull in another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
