# make quickstart and make test set everything up themselves, in .venv.
# Another interpreter: make PYTHON=/path/to/python3.10

PYTHON ?= python3.11
VENV := .venv
STAMP := $(VENV)/installed
LOG := $(VENV)/install.log
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt
# One thread for each test process: the tests start several ranks themselves.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --durations=15 --durations-min=2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-slow test-gpu lint format clean

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup: $(STAMP) ## make .venv and install everything the other targets need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 12))' 2>/dev/null || {
	    echo "error: $(PYTHON): Python 3.10 or 3.11 is needed (make PYTHON=/path/to/python3.11)" >&2
	    exit 1
	}
	rm -f $@
	# An environment whose interpreter is gone or that was left half-made cannot be mended: start it again.
	if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then
	    echo "setup: $(VENV) ($$($(PYTHON) --version))"
	    $(PYTHON) -m venv --clear $(VENV)
	fi
	: >$(LOG)
	install() {
	    local label=$$1 start=$$SECONDS pid
	    shift
	    echo "setup: installing $$label (log: $(LOG))"
	    $(PIP_INSTALL) "$$@" >>$(LOG) 2>&1 &
	    pid=$$!
	    trap 'kill $$pid 2>/dev/null' INT TERM
	    while [ -t 1 ] && kill -0 $$pid 2>/dev/null; do printf '\r  %d s' $$((SECONDS - start)); sleep 1; done
	    if ! wait $$pid; then
	        printf '\rerror: installing %s failed after %d s; the end of %s:\n' "$$label" $$((SECONDS - start)) $(LOG) >&2
	        tail -n 15 $(LOG) >&2
	        exit 1
	    fi
	    printf '\r  done in %d s\n' $$((SECONDS - start))
	}
	# torch first: what comes after it must take this build and not bring its own.
	install "torch (1 of 2)" torch
	install "megatron-most and its parts (2 of 2, a few minutes)" -e '.[audio,quickstart,dev]'
	touch $@

quickstart: $(STAMP) ## train a tiny MoST on synthetic speech on this machine's CPU, and report on it
	@$(VENV)/bin/python examples/quickstart/run.py

lint: $(STAMP) ## ruff and shellcheck
	@$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check .
	find examples megatron_most tools -name '*.sh' -print0 -o -name '*.sbatch' -print0 | xargs -0 $(VENV)/bin/shellcheck .ci/run

format: $(STAMP) ## let ruff put the code in order
	@$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .

test: lint ## lint, and every test that is not slow
	@$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP) ## the slow tests
	@$(PYTEST) -m "slow and not gpu" || test $$? -eq 5 # 5: no test is marked slow

test-gpu: $(STAMP) ## the tests that compare a GPU with the CPU; each says why where it is skipped
	@$(PYTEST) -m gpu -rs tests/gpu

clean: ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
