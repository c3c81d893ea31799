# Two commands do everything on a fresh clone: `make quickstart` and `make test`. Each sets up .venv by itself, once.

PYTHON ?= python3
# PIP_FLAGS is passed to pip: a package index with the smaller CPU build of torch, for example.
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart story test test-slow check format bench bench-search lock clean-venv

help:
	@echo "make quickstart   real text to a forecast, a trained small model, a report and a chat (4 to 12 minutes on 2 cores)"
	@echo "make test         the test suite (7 minutes on 2 recent cores, 10 on 2 slow ones)"
	@echo "make check        ruff, pyright, import arrows"
	@echo "make bench        the speed comparisons, one after the other"
	@echo "make bench-search a search against a grid of 625 trials, and more of its kind (40 minutes on 2 cores)"
	@echo "make story        the whole program on one page: docs/story.sh"

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@echo "Setting up $(VENV): about 500 MB of packages with a CPU build of torch (2.8 GB with the CUDA build), 2 to 8 minutes."
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "windtunnel needs Python 3.11 or newer; this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/windtunnel quickstart

story: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/story.sh

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_FLAGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow" $(PYTEST_FLAGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_house.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for script in $(filter-out bench/search.py bench/trainer.py bench/pick.py bench/decisions.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script --json || exit 1; done

bench-search: $(STAMP)
	PYTHONPATH=. $(BIN)/python bench/search.py --json

# Exact versions of everything, development tools included, from a clean environment.
lock:
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet 'torch==2.13.0' 'setuptools>=77' -e '.[dev]'
	{ echo "# Exact versions for Python 3.11 (make lock). A GPU user installs a newer torch over it."; \
	  .lock-venv/bin/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' ; \
	  .lock-venv/bin/python -m pip freeze --all | grep '^setuptools=='; } > requirements.lock
	rm -rf .lock-venv

clean-venv:
	rm -rf $(VENV)
