# Everything a fresh clone needs. Each target sets up .venv by itself; nothing outside it is touched.
# Pick the interpreter with PYTHON=..., more test arguments with ARGS=..., test processes with WORKERS=...
PYTHON ?=
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test check lint typecheck format faults fuzz bench docs clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/run.stamp ## train a ternary network next to a float one and write a report
	$(BIN)/forge demo

test: $(VENV)/dev.stamp ## run every test and docstring example
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: lint typecheck test ## what must hold before a change lands: lint, format, types, tests

lint: $(VENV)/dev.stamp ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/dev.stamp ## mypy
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

faults: $(VENV)/dev.stamp ## kill real training a hundred times and at every moment of a save; minutes
	PYTHONPATH=tests $(BIN)/python -m faults.trials $(ARGS)

# A case whose library is missing keeps its row with the error, so the libraries come first.
fuzz: $(VENV)/dev.stamp ## change data files of every format for a minute and read them in a sandbox
	PYTHONPATH=tests $(BIN)/python -m hostile.fuzz $(ARGS)

bench: $(VENV)/bench.stamp ## measure against float layers and other libraries; hours; replaces the records
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "$$script"; $(BIN)/python "$$script" $(ARGS); \
	done

# Adapters are documented too, so the trainers that they adapt to are needed.
docs: $(VENV)/dev.stamp ## write the API reference to build/api
	@$(PIP_INSTALL) --editable ".[dev,docs]"
	$(BIN)/python tools/make_docs.py build/api

clean: ## remove caches and build leftovers
	rm -rf build dist phases/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find phases tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv as well; runs/ stays
	rm -rf $(VENV)

# Order-only: a newer interpreter is no reason to reinstall.
$(VENV)/pyvenv.cfg:
	@sh tools/make_venv.sh $(VENV) $(PYTHON)

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing Forge and what it needs into $(VENV); this takes a minute or two the first time."
	@$(PIP_INSTALL) --editable ".[tasks]"
	@touch $@

# The development set contains all of the other one.
$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing Forge and its development tools into $(VENV); this takes a minute or two the first time."
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/run.stamp

$(VENV)/bench.stamp: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing Forge and the libraries it is compared with into $(VENV)."
	@$(PIP_INSTALL) --editable ".[tasks,bench]"
	@touch $@
