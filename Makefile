# Every target makes the virtual environment first, if it is not there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
PYTEST := $(BIN)/python -m pytest
# One thread for each test process: the processes share the cores.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n auto

.PHONY: demo test test-thorough lint types format bench docs examples clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "purprune needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

demo: $(READY)  ## train, prune, fine-tune, export and verify, on the embedded data
	$(BIN)/python examples/magnitude_pruning.py

test: lint types  ## lint, types, tests and doc examples
	$(PARALLEL)

test-thorough: lint types  ## 2,000 examples for every property, and the wide sweeps
	HYPOTHESIS_PROFILE=thorough $(PARALLEL)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --compile
	$(BIN)/python benchmarks/export.py

docs: $(DOCS_READY)  ## build the site into site/, without a warning, and run the notebook
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/book/mkdocs.yml
	$(PYTEST) tests/test_docs.py

examples: $(READY)  ## run every code block of the documentation
	$(PYTEST) README.md docs purprune adapters/purprune_adapters

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs site
