# make demo   set up, then find super weights, train and evaluate on the embedded model
# make test   set up, then lint, type-check and run every test
# make coverage   the quick tests, and which lines of the package they do not run
# make test-newest   the engine's tests with the newest packages, torch among them: what broke
# make site   build the documents' site into build/site; a warning is an error
# make faults kill and damage trainings, strain a server, half an hour: docs/results/faults.json
# make lock   renew requirements.lock from the newest versions that pyproject.toml allows
# make settings   renew the typed keyword arguments of the Python functions, after a change of src/swlora/config

PYTHON ?= python3
TORCH := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Stamps: present and newer than what they depend on when the installation is complete
PACKAGE := $(VENV)/.package-installed
TOOLS := $(VENV)/.tools-installed
# llama.cpp, in which exported files are tested: the binaries of this platform, without a GPU's
LLAMA_CPP_VERSION := 3.21.1
LLAMA_CPP := .cache/llama-cpp/.installed-$(LLAMA_CPP_VERSION)
LLAMA_CPP_PLATFORM = $(shell node -p '({darwin: {arm64: "mac-arm64-metal", x64: "mac-x64"}}[process.platform] || {})[process.arch] || `$${process.platform}-$${process.arch}`')
# A process for every core, each of which computes with one thread (tests/conftest.py)
PARALLEL := --numprocesses auto --maxprocesses 4 --durations 15 --durations-min 10
QUICK := "not slow and not gpu and not browser"

.PHONY: help demo test coverage test-newest lint site faults lock settings clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(PACKAGE)
	@BIN=$(BIN) bash examples/demo.sh

test: lint site $(LLAMA_CPP)
	$(BIN)/python -c "from swlora.models.builtin import builtin_folder; print('builtin model:', builtin_folder())"
	$(BIN)/python -m pytest $(PARALLEL) -m $(QUICK)
	$(BIN)/python -m pytest $(PARALLEL) -m browser
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu"

# Apart from the tests: tracing every line of Python takes as long as half of what they do
coverage: $(TOOLS)
	$(BIN)/python -m pytest $(PARALLEL) -m $(QUICK) --cov --cov-report=term:skip-covered

# Another Python: make PYTHON=python3.14 test-newest
NEWEST := .cache/newest
NEWEST_TESTS := tests/kernels tests/adapters tests/training tests/decoding
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python tools/install_torch.py torch
	$(NEWEST)/bin/python -m pip install --quiet --group dev --editable .
	$(NEWEST)/bin/python tools/newest.py requirements.lock $(PARALLEL) -q \
	  -m $(QUICK) $(NEWEST_TESTS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

site: $(TOOLS)
	$(BIN)/zensical build --clean --strict

faults: $(TOOLS)
	$(BIN)/python -m benchmarks.faults --json docs/results/faults.json

lock:
	rm -rf .cache/lock
	$(PYTHON) -m venv .cache/lock
	.cache/lock/bin/pip install --quiet --upgrade pip
	.cache/lock/bin/python tools/install_torch.py torch==$(TORCH)
	.cache/lock/bin/pip install --quiet --group dev torch==$(TORCH) -e .
	{ echo "# The versions that the tests run with; 'make lock' renews them."; \
	  .cache/lock/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > requirements.lock
	rm -rf .cache/lock

settings: $(TOOLS)
	$(BIN)/python -m tests.support.typed_settings

clean:
	rm -rf $(VENV) .cache build dist .coverage .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "swlora needs Python 3.11 or newer as $(PYTHON)." \
	    "Install it, or name another one: make PYTHON=python3.12 demo" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments." \
	    "On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(PACKAGE): pyproject.toml requirements.lock | $(BIN)/python
	@echo "installing swlora and what it needs into $(VENV) (some minutes the first time)"
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(BIN)/python tools/install_torch.py torch --constraint requirements.lock
	$(PIP) install --progress-bar=on --constraint requirements.lock --editable .
	@touch $@

# Without npm, or where it fails, the tests in llama.cpp are skipped and say so
$(LLAMA_CPP):
	@if command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)'; then \
	  npm install --prefix .cache/llama-cpp --no-save --no-audit --no-fund --loglevel=error \
	    --omit=optional --ignore-scripts node-llama-cpp@$(LLAMA_CPP_VERSION) \
	    @node-llama-cpp/$(LLAMA_CPP_PLATFORM)@$(LLAMA_CPP_VERSION) && touch $@ || \
	    echo "node-llama-cpp could not be installed: exported files are not tested in llama.cpp" >&2; \
	else \
	  echo "there is no npm with Node.js 20 or newer: exported files are not tested in llama.cpp" >&2; \
	fi

$(TOOLS): $(PACKAGE)
	$(PIP) install --quiet --constraint requirements.lock --group dev
	@touch $@
