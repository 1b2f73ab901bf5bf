# make demo   fine-tune, merge and evaluate on real images, with a table and a picture
# make bench  measure kernels and whole models on this machine: report, tables and pictures in runs/bench
# make test   everything that has to hold: style, types, the build, all tests
# make build  (re)build the compiled module in place;   make lint   style and types alone
# make clean  remove what was built;   make distclean   the virtual environment too
#
# PYTHON=... chooses the interpreter for .venv; MOSA_CUDA=0 leaves the CUDA kernels out.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TESTS ?=
BENCH ?=

CORES := $(shell nproc 2>/dev/null || echo 1)
WORKERS := $(shell [ $(CORES) -ge 2 ] && echo 2 || echo 1)
THREADS := $(shell echo $$(( $(CORES) / $(WORKERS) )))

NATIVE := $(wildcard csrc/*) CMakeLists.txt setup.py mosa_kernels/version.py
CLANG_FORMATTED := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu tests/csrc/*/*)

.PHONY: demo bench test lint build check-native unit-tests clean distclean

demo: $(VENV)/.built
	$(BIN)/mosa-kernels demo

bench: $(VENV)/.built
	$(BIN)/mosa-kernels bench --output runs/bench $(BENCH)

test: lint check-native unit-tests

lint: $(VENV)/.dependencies
	@echo "== style"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)
	@echo "== types"
	$(BIN)/mypy

build: $(VENV)/.built

# The same sources again with warnings as errors, beside the build in use, which has to work with any compiler.
check-native: $(VENV)/.dependencies
	@echo "== compiled module, warnings are errors"
	MOSA_STRICT=1 $(BIN)/python setup.py --quiet build_ext --build-temp build/strict/temp --build-lib build/strict/lib

unit-tests: $(VENV)/.built
	@echo "== tests"
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) $(TESTS)

$(VENV)/.created: .ci/make-venv
	.ci/make-venv $(VENV) $(PYTHON)
	@touch $@

$(VENV)/.dependencies: $(VENV)/.created pyproject.toml
	@echo "== dependencies (PyTorch is a large download)"
	$(BIN)/python -m pip install --upgrade pip "setuptools>=64" "cmake>=3.18" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf build dist *.egg-info mosa_kernels/_C*.so mosa_kernels/_build.json $(VENV)/.built
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

distclean: clean
	rm -rf $(VENV)
