# `make test` and `make demo` set up all they need; the rest assumes nothing either.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
TESTBED := tests/testbed/with-testbed.sh

.PHONY: test test-unit test-browser test-image check demo demo-clean bench bench-checks soak clean

$(VENV)/.made: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

test: test-unit test-browser test-image

test-unit: $(VENV)/.made
	$(BIN)/python -m pytest -n 4 --dist worksteal tests/unit

test-browser: $(VENV)/.made
	tests/testbed/browser.sh $(BIN)/python -m pytest tests/browser

test-image: $(VENV)/.made
	$(TESTBED) $(BIN)/python -m pytest --durations=30 tests/image

check: $(VENV)/.made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

demo: $(VENV)/.made
	tests/testbed/demo.sh

demo-clean:
	tests/testbed/clean.sh

# Every figure of the README, in one run on a quiet machine.
bench: $(VENV)/.made
	$(TESTBED) benchmarks/suite.sh

# What holds bench itself to account: 25 minutes on a quiet machine.
bench-checks: $(VENV)/.made
	$(TESTBED) benchmarks/checks.sh

# What a request pays, fifty shutdowns under load, each fault timed: 40 minutes on a quiet machine.
soak: $(VENV)/.made
	$(TESTBED) benchmarks/soak.sh

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
