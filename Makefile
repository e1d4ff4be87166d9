# Needs only Python >= 3.10 and make: the first target that needs .venv builds it, later ones reuse it.
.DEFAULT_GOAL := help

PYTHON ?= python3  # used to build .venv
ENV ?= Pendulum-v1
ARGS ?=
# Number of parallel test processes, e.g. `make test WORKERS=2`. A file stays in one process, so its fixtures are built once.
WORKERS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := sb3_mbmpo tests $(wildcard tuning docs/examples)
TYPED := sb3_mbmpo $(wildcard tuning)

# Rebuilt only when the requirements change. The package is installed in editable mode, so edits need no rebuild.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

.PHONY: train
train: $(STAMP) ## Train on Pendulum-v1, or resume; ENV=... for another environment, ARGS="..." for more options
	$(BIN)/python -m sb3_mbmpo train --env $(ENV) $(if $(findstring --overwrite,$(ARGS)),,--resume) $(ARGS)

# One thread per process: the tests' networks are so small that several threads would only wait for one another.
.PHONY: test
test: $(STAMP) ## Run the tests; ARGS="-k imagine" or ARGS="-m slow" to select, WORKERS=2 for two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q $(if $(WORKERS),-n $(WORKERS) --dist loadfile) $(ARGS)

# -W: a broken link or a docstring that does not parse is an error. It needs no network.
.PHONY: docs
docs: $(STAMP) ## Build the documentation site, docs/_build/html/index.html
	$(BIN)/python -m sphinx -W -E --keep-going -q docs docs/_build/html

.PHONY: bench
bench: $(STAMP) ## Compare the engine with bare matmuls; ARGS="--sizes half-cheetah --threads 1 2" to select
	$(BIN)/python -m tests.benchmarks.engine $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, formatting and the order of the layers
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports --no-logo

.PHONY: type
type: $(STAMP) ## Check types
	$(BIN)/mypy $(TYPED)

.PHONY: format
format: $(STAMP) ## Sort imports, apply ruff's fixes, reformat
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: clean
clean: ## Remove .venv, caches and builds; keep models and logs
	rm -rf $(VENV) build dist *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .benchmarks docs/_build
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
