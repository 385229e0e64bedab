# `make demo`, `make test` and `make check` need Python 3.11 or newer and make, and nothing else: each creates .venv,
# installs Secateur there under the versions of constraints.txt, and runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV   ?= .venv
JOBS   ?= auto
BIN    := $(VENV)/bin

# One process per core, one thread per process: small networks run no faster on more threads.
TEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8

.PHONY: demo test slow search lint check docs clean help

help: ## Show what make can do
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(VENV)/.installed-run ## Train, compress and verify a LeNet-5 on real digits, without a download
	$(BIN)/secateur demo

test: $(VENV)/.installed-dev ## Run the tests that take minutes at most
	$(TEST) -m "not slow"

slow: $(VENV)/.installed-dev ## Run the slow system tests
	$(TEST) -m slow

search: $(VENV)/.installed-dev ## Run the property-based tests on examples drawn anew
	$(TEST) -m "not slow" --hypothesis-profile=search

lint: $(VENV)/.installed-dev ## Check style, docstrings, types and the arrows of the layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## Everything that a change must pass

docs: $(VENV)/.installed-docs ## Build the site of docs/ into docs/_build/html, warnings as errors, links checked
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The stamps hold an installation until the project file or the pins change.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Secateur needs Python 3.11 or newer, not $(PYTHON); name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing Secateur into $(VENV): a few minutes the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef

$(VENV)/.installed-run: pyproject.toml constraints.txt
	$(call install,.)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt
	$(call install,.[docs])
	@touch $@ $(VENV)/.installed-run

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch $@ $(VENV)/.installed-run $(VENV)/.installed-docs
