# make quickstart and make test set everything up themselves, in .venv.
# Another interpreter than the one that is found: make PYTHON=/path/to/python3.12
# torch without CUDA, from PyTorch's index or another: make TORCH=cpu [TORCH_INDEX=https://...]

PYTHON ?=
TORCH ?= pypi
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION := 2.13.0
# What make wheelhouse collects: gpu-suite (a few MB), training or audio.
FOR ?= gpu-suite
VENV := .venv
STAMP := $(VENV)/installed
LOG := $(VENV)/install.log
# Without byte code, which takes 0.4 GB and is made when it is first needed. Container images often forbid Python to write
# it; then every process would compile torch and Megatron again, which takes 13 s.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off
# One thread for each test process: the tests start several ranks themselves.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --durations=15 --durations-min=2

WHEELS_gpu-suite := tests/gpu/wheels.txt
WHEELS_training := docker/requirements-training.txt
WHEELS_audio := docker/requirements-training.txt docker/requirements-audio.txt

ifeq ($(TORCH),cpu)
    TORCH_WHAT := torch $(TORCH_VERSION) for CPUs, 0.2 GB to download, from $(TORCH_INDEX)
    TORCH_FROM := --index-url $(TORCH_INDEX)
else ifeq ($(TORCH),pypi)
    TORCH_WHAT := torch $(TORCH_VERSION) with CUDA, about 2.8 GB to download
    TORCH_FROM :=
else
    $(error TORCH=$(TORCH): pypi or cpu)
endif

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: help setup check-environment wheelhouse quickstart test test-slow mutants audit test-gpu lint format docs clean

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 19

setup: $(STAMP) ## make .venv and install everything the other targets need

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	# An environment whose interpreter is gone or too old, or that was left half-made, cannot be mended: start it again.
	fits() { $(VENV)/bin/python -m pip --version && $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; }
	if [ -n "$(PYTHON)" ] || ! fits >/dev/null 2>&1; then
	    python=$$(tools/find_python.sh $(PYTHON))
	    if ! fits >/dev/null 2>&1 || [ "$$($(VENV)/bin/python -V)" != "$$($$python -V)" ]; then
	        $$python -m venv --clear $(VENV)
	    fi
	fi
	: >$(LOG)
	echo "setup: into $(VENV), $$(df -Ph $(VENV) | awk 'NR == 2 {print $$4}') free; it takes up to 7 GB (log: $(LOG))"
	install() {
	    local label=$$1 start=$$SECONDS pid
	    shift
	    echo "setup: installing $$label"
	    $(PIP_INSTALL) "$$@" >>$(LOG) 2>&1 &
	    pid=$$!
	    trap 'kill $$pid 2>/dev/null' INT TERM
	    while [ -t 1 ] && kill -0 $$pid 2>/dev/null; do printf '\r  %d s' $$((SECONDS - start)); sleep 1; done
	    if ! wait $$pid; then
	        printf '\rerror: installing %s failed after %d s; the end of %s:\n' "$$label" $$((SECONDS - start)) $(LOG) >&2
	        tail -n 15 $(LOG) >&2
	        exit 1
	    fi
	    printf '\r  done in %d s, %s has %s\n' $$((SECONDS - start)) $(VENV) "$$(du -sh $(VENV) | cut -f1)"
	}
	# torch first: what comes after it must take this build and not bring its own.
	install "$(TORCH_WHAT) (1 of 2)" $(TORCH_FROM) torch==$(TORCH_VERSION)
	install "megatron-most and its parts (2 of 2, a few minutes)" -c constraints.txt -e '.[audio,quickstart,dev]'
	echo "setup: done in $$SECONDS s"
	touch $@

check-environment: ## compare what is there with what is supported, a line for each thing that does not fit
	@python=$(VENV)/bin/python
	if [ ! -x $$python ]; then python=$${PYTHON:-python3}; fi
	$$python tools/doctor.py --check

wheelhouse: $(STAMP) ## collect wheels in wheelhouse/ for machines without network: CPython 3.12, Linux, x86-64
	@lists="$(WHEELS_$(FOR))"
	if [ -z "$$lists" ]; then echo "error: FOR=$(FOR): gpu-suite, training or audio" >&2; exit 1; fi
	$(VENV)/bin/python -m pip download --disable-pip-version-check --quiet --no-deps --prefer-binary -c constraints.txt \
	    --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_24_x86_64 \
	    --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 --dest wheelhouse $(foreach list,$(WHEELS_$(FOR)),-r $(list))
	# What is published as source alone is pure Python, and its wheel is made here.
	for source in wheelhouse/*.tar.gz; do
	    [ -e "$$source" ] || continue
	    $(VENV)/bin/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir wheelhouse "$$source"
	    rm "$$source"
	done
	du -sh wheelhouse

quickstart: $(STAMP) ## train a tiny MoST on synthetic speech on this machine's CPU, and report on it
	@$(VENV)/bin/python examples/quickstart/run.py

lint: $(STAMP) ## ruff, mypy, codespell and shellcheck
	@$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell
	find examples megatron_most tools tests -name '*.sh' -print0 -o -name '*.sbatch' -print0 | xargs -0 $(VENV)/bin/shellcheck .ci/run

format: $(STAMP) ## let ruff put the code in order
	@$(VENV)/bin/ruff check --quiet --fix .
	$(VENV)/bin/ruff format --quiet .

test: lint ## lint, and every test that is not slow
	@$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(STAMP) ## the slow tests
	@$(PYTEST) -m "slow and not gpu" || test $$? -eq 5 # 5: no test is marked slow

mutants: $(STAMP) ## change the code in small ways, one at a time, and list the changes that no test notices
	@$(PIP_INSTALL) --quiet -c constraints.txt mutmut==3.8.1
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m mutmut run --max-children 2
	$(VENV)/bin/python -m mutmut results

audit: $(STAMP) ## bandit, a bill of materials in build/sbom.json, and known vulnerabilities (needs pypi.org)
	@tools=build/audit
	$(VENV)/bin/python -m venv $$tools
	$$tools/bin/python -m pip install --quiet --disable-pip-version-check bandit==1.9.4 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	$$tools/bin/bandit --quiet -c pyproject.toml -r megatron_most tools examples
	$$tools/bin/cyclonedx-py environment --output-file build/sbom.json $(VENV)
	$$tools/bin/pip-audit --path "$$(echo $(VENV)/lib/python*/site-packages)" --skip-editable

test-gpu: $(STAMP) ## the tests that compare a GPU with the CPU; each says why where it is skipped
	@$(PYTEST) -m gpu -rs tests/gpu

docs: $(STAMP) ## build the documentation in site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

clean: ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
