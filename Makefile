# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOOR := .venv-floor
EXTRAS := test,lint

.PHONY: demo test test-all test-floor lint format bench clean coverage crosscheck identify

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.neighbours: $(VENV)/.installed  ## what variants are tested beside; 0.4 GB
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[neighbours,units]'
	touch $@

$(FLOOR)/.installed: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.installed  ## the main job on a real model and real text
	$(BIN)/hf-geglu demo --overwrite

test: $(VENV)/.neighbours  ## the suite that CI runs
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-all: $(VENV)/.neighbours  ## the slow tests too
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-floor: $(FLOOR)/.installed  ## the suite on the oldest supported transformers
	$(FLOOR)/bin/python -m pytest -m "not slow" --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## measure what the README claims; results go to benchmarks/results
	$(BIN)/python -m benchmarks.find_sites
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.quality

.zoo-extras/.installed: constraints-zoo.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .zoo-extras --requirement constraints-zoo.txt
	touch $@

coverage: .zoo-extras/.installed  ## every model type, from its config to a reloaded variant; docs/coverage.md
	$(BIN)/python -m benchmarks.coverage

crosscheck: .zoo-extras/.installed  ## a second opinion on the finder over every model type; docs/crosscheck.md
	$(BIN)/python -m benchmarks.crosscheck

identify: .zoo-extras/.installed  ## every feed-forward class and every config of transformers; docs/identify.md
	$(BIN)/python -m benchmarks.identify

clean:
	rm -rf $(VENV) $(FLOOR) .zoo-extras build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
