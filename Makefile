# make help lists the targets. Everything runs in .venv, which `make setup` builds; nothing is installed outside it.
#
#   PYTHON=python3.12           the interpreter for the virtual environment (3.11 or newer)
#   TORCH_INDEX=URL             a package index with another build of torch (CUDA, ROCm), used for torch alone
#   EXTRAS=dev,xformers         the extras to install
#   JOBS=2                      trainings side by side in make bench-compose

PYTHON ?= python3
TORCH_INDEX ?=
EXTRAS ?= dev
JOBS ?= 1
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
ROOMS := studio compose training pipelines ui

# One stamp a choice of torch build and extras: a second run with the same choice installs nothing.
empty :=
space := $(empty) $(empty)
CHOICE := $(subst $(space),_,$(subst /,_,$(subst :,_,$(TORCH_INDEX)+$(EXTRAS))))
STAMP := $(VENV)/.set-up-$(CHOICE)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format wheel bench-compose bench-speed clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## build .venv with the tested versions and install the studio into it

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo 'setting up $(VENV): a few minutes the first time'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH_INDEX),)
	$(PIP) install -qq "$$(grep '^torch==' constraints.txt)" -c constraints.txt
else
	$(PIP) install -qq --force-reinstall "$$(grep '^torch==' constraints.txt)" --index-url "$(TORCH_INDEX)"
endif
	$(PIP) install -qq --editable '.[$(EXTRAS)]' -c constraints.txt
	@touch $@

demo: setup ## draw two taught subjects side by side, teach one live, and leave a contact sheet in outputs/demo/
	$(VENV)/bin/studio demo

test: setup lint ## set up, then all quick tests, style, types and the import contract
	$(PY) -m pytest

test-slow: setup ## the long tests: training, and a clean installation outside the checkout
	$(PY) -m pytest -m slow

lint: setup ## style (ruff), types (mypy) and the import contract alone
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: setup ## rewrite the code in the house style
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

wheel: setup ## build the wheel into dist/
	$(PIP) wheel -qq --no-deps --no-build-isolation --wheel-dir dist .

bench-compose: setup ## train 22 LoRAs, compare the composition methods on 120 combinations (hours), tables into docs/results.md
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.compose train --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.compose run --methods usual,parts --report docs/results.md

bench-speed: setup ## what composing costs, as ratios, into docs/performance.md; the machine must be quiet
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.guided_cost --report docs/performance.md
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.speed --report docs/performance.md

clean: ## remove the virtual environment, caches and built files (never outputs/)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
