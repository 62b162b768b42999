# `make serve` and `make test` work from a fresh clone: Python 3.11+, a C++ compiler, nothing else.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
MODEL ?=
BIN := $(VENV)/bin

# torch 2.13 is the version tested with. Without a GPU only a CPU build will do: the default wheels bring
# gigabytes of CUDA. pip takes the CPU build where one is at hand; uv knows where else to find it.
TORCH ?= torch==2.13.0
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.DEFAULT_GOAL := help
.PHONY: help serve test lint fmt bench gpu-check docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install -q "$(TORCH)"
else
	$(BIN)/pip install -q "$(TORCH)+cpu" 2>/dev/null || \
	  { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu "$(TORCH)"; }
endif
	@touch $@

# Editable: Python files are used in place; a change of the native core or of the build files installs again.
NATIVE := $(wildcard engine/memlane/native/src/*) CMakeLists.txt pyproject.toml clients/python/pyproject.toml
$(VENV)/memlane.done: $(VENV)/torch.done $(NATIVE)
	$(BIN)/pip install -q "scikit-build-core>=0.11" "nanobind>=2.8" cmake ninja
	$(BIN)/pip install -q --no-build-isolation -e .
	$(BIN)/pip install -q -e clients/python
	@touch $@

$(VENV)/dev.done: $(VENV)/memlane.done
	$(BIN)/pip install -q --group dev
	@touch $@

serve: $(VENV)/memlane.done ## serve the demo model (PORT=8000), or MODEL=path
	$(BIN)/memlane serve $(MODEL) --port $(PORT)

test: $(VENV)/dev.done ## all tests
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(VENV)/dev.done ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/dev.done ## measure; results go to benchmarks/results
	$(BIN)/python benchmarks/run.py

# The machine's own python3, which has torch for its GPU; nothing is downloaded. Wheels it lacks: deploy/gpu/wheels.sh.
gpu-check: ## check and measure the GPU path, without internet, in under 9 minutes (GPU_CHECK=--help)
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean: ## remove the environment and build outputs
	rm -rf $(VENV) build dist
