# On a fresh machine two commands: `make demo` and `make test`. Each makes the environment when it is missing.
#   VENV=dir          where the environment lives
#   PYTHON=python3.x  which interpreter makes it
#   TORCH="..."       what pip installs first, index options included, e.g. to pick PyTorch's CPU-only build
#   PYTEST_ARGS="..." more arguments for pytest
# `make gpu-compile` compiles the kernels of training for GPUs. It needs no GPU, but an environment of its own with
# PyTorch's CUDA build (5 GB).
#   VENV_GPU=dir      where that environment lives
#   TORCH_GPU="..."   what pip installs first; the three "=" take the release itself, not a CPU-only build of the same number
#   GPU_ARGS="..."    arguments for tools/compile_for_gpu.py

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
VENV_GPU ?= .venv-gpu
TORCH_GPU ?= torch===2.13.0 triton==3.7.1
GPU_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.unigen-stamp
STAMP_GPU := $(VENV_GPU)/.unigen-stamp

# Where there is an NVIDIA GPU a PyTorch that already drives it is kept: its build has to fit the driver.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_GPU),yes)
CONSTRAINTS = $(VENV)/.unigen-constraints.txt
else
CONSTRAINTS = constraints.txt
endif

.DEFAULT_GOAL := help
.PHONY: help install demo fast test lint format clean gpu-compile

help:
	@echo "make demo | fast | test | lint | format | install | clean | gpu-compile"

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamp is written last, so an interrupted installation is taken up again; a second call installs nothing.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes."
ifeq ($(HAS_GPU),yes)
	$(BIN)/python -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || $(BIN)/pip install -qq $(TORCH)
	grep -v '^torch==' constraints.txt > $(CONSTRAINTS)
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" >> $(CONSTRAINTS)
else
	$(BIN)/pip install -qq -c constraints.txt $(TORCH)
endif
	$(BIN)/pip install -qq -c $(CONSTRAINTS) setuptools
	$(BIN)/pip install -qq -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/unigen demo

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" $(PYTEST_ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-compile: $(STAMP_GPU)
	$(VENV_GPU)/bin/python tools/compile_for_gpu.py $(GPU_ARGS)

# PyTorch's build for CUDA, and the few packages that the model's own files import.
$(STAMP_GPU): constraints.txt
	@echo "Installing PyTorch for CUDA into $(VENV_GPU), about 5 GB."
	test -x $(VENV_GPU)/bin/python || $(PYTHON) -m venv $(VENV_GPU)
	$(VENV_GPU)/bin/pip install -qq $(TORCH_GPU)
	$(VENV_GPU)/bin/pip install -qq -c constraints.txt einops numpy pillow
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(VENV_GPU)/*' -prune -exec rm -rf {} +
