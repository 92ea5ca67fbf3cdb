# make demo | demo-safety | test | test-slow | check | bench | fmt | clean       each installs what it needs into .venv first
#
#   make PYTHON=python3.12 ...      another interpreter, 3.11 or newer
#   make TORCH=torch ...            another build of PyTorch: any arguments of pip install, in quotes
#   make demo DEMO='--windows 4'    options of the demo; python examples/demo.py --help lists them
#   make demo-safety DEMO='--limit 24'   likewise; python examples/safety_demo.py --help

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CODE := src tests $(wildcard benchmarks) $(wildcard examples)
LONGEST := 400

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-safety test test-slow check bench fmt clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# PyTorch goes first and by itself, so that the build asked for is there before anything depends on it.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found="not there"; \
	  echo "Secateur needs Python 3.11 or newer, and '$(PYTHON)' is $$found."; \
	  echo "Install one and name it: make PYTHON=python3.12 ..."; exit 1; } >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian or Ubuntu install the package python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nanogcg==0.3.0  # asks for transformers 4
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO)

demo-safety: $(READY)
	$(BIN)/python examples/safety_demo.py $(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	@find $(CODE) -name '*.py' -exec wc -l {} + | awk '$$2 != "total" && $$1 > $(LONGEST) \
	  { print $$2 ": " $$1 " lines, more than $(LONGEST): it wants to be two files"; long = 1 } END { exit long }'

bench: $(READY)
	@set -e; for script in benchmarks/*.py; do \
	  test -e "$$script" || { echo "there is no benchmark"; exit 1; }; \
	  echo "== $$script"; $(BIN)/python "$$script"; done

fmt: $(READY)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf $(VENV) build dist demo demo-safety .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
