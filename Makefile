# make demo   fine-tune, merge and evaluate on real images, with a table and a picture
# make bench  measure kernels and whole models on this machine: report, tables and pictures in runs/bench
# make test   everything that has to hold: style, types, the build, all tests
# make build  (re)build the compiled module in place;   make lint   style and types alone
# make nvrtc  download the compiler that checks the kernels for V100; make test does it too
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
# Kernels for all GPUs take minutes to compile, which nobody without one has to wait for but the tests.
USABLE := $(VENV)/$(if $(shell nvidia-smi -L 2>/dev/null),.built,.built-for-cpu)
NVRTC := build/nvrtc12
NVRTC_WHEELS := nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-nvcc-cu12
CLANG_FORMATTED := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu) $(filter-out tests/csrc/__pycache__/%,$(wildcard tests/csrc/*/*))

.PHONY: demo bench test lint build unit-tests clean distclean

demo: $(USABLE)
	$(BIN)/mosa-kernels demo

bench: $(USABLE)
	$(BIN)/mosa-kernels bench --output runs/bench $(BENCH)

test: lint unit-tests

lint: $(VENV)/.dependencies
	@echo "== style"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)
	@echo "== types"
	$(BIN)/mypy

build: $(VENV)/.built-strictly

# The last compiler that knows V100, apart from the CUDA libraries of PyTorch. Without it, its tests are skipped.
nvrtc: $(VENV)/.created
	@[ -e $(NVRTC)/.complete ] || { echo "== runtime compiler of CUDA 12, for the kernels on V100 (130 MB)"; rm -rf $(NVRTC); \
	  $(BIN)/python -m pip install --quiet --no-deps --target $(NVRTC) $(NVRTC_WHEELS) && touch $(NVRTC)/.complete; } || \
	  echo "the runtime compiler of CUDA 12 cannot be had: the kernels are not checked for V100"

unit-tests: $(VENV)/.built-strictly nvrtc
	@echo "== tests"
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -q -n $(WORKERS) $(TESTS)

$(VENV)/.created: .ci/make-venv
	.ci/make-venv $(VENV) $(PYTHON)
	@touch $@

$(VENV)/.dependencies: $(VENV)/.created pyproject.toml
	@echo "== dependencies (PyTorch is a large download)"
	$(BIN)/python -m pip install --upgrade pip "setuptools>=70.1" "cmake>=3.18" ninja "pybind11>=2.13"
	MOSA_CPP=0 $(BIN)/python -m pip install --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.built-for-cpu: $(VENV)/.dependencies $(NATIVE)
	MOSA_CUDA=0 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(NATIVE)
	@echo "== compiled module (with nvcc for all GPUs: minutes)"
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@ $(VENV)/.built-for-cpu

# What is tested is built with warnings as errors; the build of a user has to work with any compiler.
$(VENV)/.built-strictly: $(VENV)/.dependencies $(NATIVE)
	@echo "== compiled module, warnings are errors (with nvcc for all GPUs: minutes)"
	MOSA_STRICT=1 $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@ $(VENV)/.built $(VENV)/.built-for-cpu

clean:
	rm -rf build dist *.egg-info mosa_kernels/_C*.so mosa_kernels/_build.json $(VENV)/.built*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

distclean: clean
	@[ ! -e $(VENV) ] || [ -e $(VENV)/.created ] || { echo "$(VENV) was not made by make: left alone" >&2; exit 1; }
	rm -rf $(VENV)
