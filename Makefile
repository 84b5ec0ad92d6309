# Everything from a bare checkout: each target makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Most of what is installed is never imported: Python compiles a module when one is, and keeps it.
PIP_INSTALL := pip --disable-pip-version-check install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/$(PIP_INSTALL) --constraint constraints.txt
CORE := $(shell find csrc cmake -type f) CMakeLists.txt
SOURCES := $(CORE) $(shell find fusedopt triton_kernels -name '*.py' -o -name '*.pyi') setup.py pyproject.toml constraints.txt

# Where there is nvcc, one architecture is enough to look at and quick to build; a plain `pip install` takes all.
export FUSEDOPT_CUDA_ARCHITECTURES ?= 90

# The CUDA kernels, compiled for the CPU, as the tests run them (tests/cuda_on_cpu): not every rule with every format,
# because they take long to compile, or else all.
EMULATED := $(VENV)/emulated
EMULATED_ALL := $(VENV)/emulated-all
test-all sanitize-all: EMULATED := $(EMULATED_ALL)

# Tests step with more threads than cores; waiting for each other asleep keeps that quick.
PYTEST = OMP_WAIT_POLICY=passive FUSEDOPT_EMULATED=$(abspath $(EMULATED)) $(BIN)/pytest

CPP = $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cuda_on_cpu/*')

.PHONY: demo emulated test test-all test-torch install-check bench gpu-check lint format sanitize sanitize-all docs ci \
	clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a small GPT with torch's AdamW and ours, and compare"
	@echo "make test      run the tests (make test-all adds long ones and all combinations)"
	@echo "make test-torch TORCH=2.6.0  run the CPU's tests against that torch, in an environment of its own"
	@echo "make install-check  install as users do, in new environments"
	@echo "make bench     measure the optimizer step against torch and installed peers"
	@echo "make gpu-check with a GPU: build, test and measure the CUDA kernels, offline, with PYTHON's packages (OUT=folder)"
	@echo "make lint      ruff, mypy, import-linter, clang-format"
	@echo "make docs      build the documentation's site in out/site"
	@echo "make sanitize  run the core's tests under AddressSanitizer and UBSan"

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and pinned: nothing installed later may bring another.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	$(PIP) torch numpy
	@touch $@

# What one of the package's extras requires. Apart from the package, because make -j compiles that meanwhile, in an
# environment that pip makes for it.
EXTRAS := demo test bench docs dev
$(EXTRAS:%=$(VENV)/.requirements-%): $(VENV)/.requirements-%: tools/requirements.py pyproject.toml constraints.txt | $(VENV)/.torch
	$(BIN)/python $< $* > $@.txt
	$(PIP) --requirement $@.txt
	@touch $@

WHEEL := $(VENV)/wheel/.built
$(WHEEL): $(SOURCES) | $(VENV)/.made
	rm -rf $(@D)
	$(BIN)/pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $(@D) .
	@touch $@

# The package with one of its extras; dev has test, bench and docs in it.
$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: $(VENV)/.requirements-% $(WHEEL)
	$(PIP) --no-deps --force-reinstall $(dir $(WHEEL))*.whl
	@touch $@ $(if $(filter dev,$*),$(VENV)/.test $(VENV)/.bench $(VENV)/.docs)

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out out

$(EMULATED)/.installed $(EMULATED_ALL)/.installed: $(VENV)/%/.installed: $(VENV)/.test $(CORE) \
		$(wildcard tests/cuda_on_cpu/*)
	$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DFUSEDOPT_CUDA_ON_CPU=ON \
		-DFUSEDOPT_FEW_KERNELS=$(if $(filter emulated,$*),ON,OFF) \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	MAKEFLAGS= $(BIN)/cmake --build build/$* --target _cuda
	mkdir -p $(@D)
	cp build/$*/_cuda*.so $(@D)
	@touch $@

emulated: $(EMULATED)/.installed

test: $(VENV)/.test $(EMULATED)/.installed
	$(PYTEST) -n 2 --dist worksteal -m "not slow and not thorough"

test-all: $(VENV)/.test $(EMULATED_ALL)/.installed sanitize-all
	$(PYTEST) -n 2 --dist worksteal -m "not slow"
	$(PYTEST) -m slow

install-check: $(VENV)/.test
	$(PYTEST) -m slow tests/test_install.py

# Against a torch other than that of constraints.txt. Left out is what does not reach the CPU's kernels: CUDA's need no
# torch, and Triton's need a triton of their own.
TORCH_VENV := .venv-torch-$(TORCH)
$(TORCH_VENV)/.test: $(SOURCES)
	$(if $(TORCH),,$(error say which torch: make test-torch TORCH=2.6.0))
	$(PYTHON) -m venv $(TORCH_VENV)
	FUSEDOPT_CMAKE_ARGS=-DFUSEDOPT_CUDA=OFF FUSEDOPT_BUILD_DIR=build/test-torch \
		$(TORCH_VENV)/bin/$(PIP_INSTALL) torch==$(TORCH) ".[test]"
	@touch $@

test-torch: $(TORCH_VENV)/.test
	OMP_WAIT_POLICY=passive $(TORCH_VENV)/bin/pytest -n 2 --dist worksteal -m "not slow and not thorough and not gpu" \
		--ignore=tests/cuda --ignore=tests/triton

bench: $(VENV)/.bench
	$(BIN)/python bench/run.py --processes 3 --out out/bench

# Without the virtual environment: where the GPU is, there may be no way to install anything.
OUT ?= out/gpu
gpu-check:
	$(PYTHON) bench/gpu_check.py --out $(OUT) $(if $(ONLY),--only $(ONLY))

# The variable silences a notice of the theme's about mkdocs 2, which is not installed.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# A second copy of the package, built with checks, runs the tests that reach the core. The interpreter is
# not built with them, so their libraries are preloaded; it never frees everything, so leaks are not looked for.
# -s: their report comes with an abort, which would take captured output along.
SANITIZED := $(VENV)/sanitized
$(SANITIZED)/.installed: $(VENV)/.test $(SOURCES)
	rm -rf $(SANITIZED)
	PATH="$(abspath $(BIN)):$$PATH" FUSEDOPT_CMAKE_ARGS='-DFUSEDOPT_SANITIZE=ON -DFUSEDOPT_CUDA=OFF' \
		FUSEDOPT_BUILD_DIR=build/sanitize $(PIP) --no-build-isolation --no-deps --target $(SANITIZED) .
	@touch $@

SANITIZED_PYTEST = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) FUSEDOPT_SANITIZED=1 \
	$(PYTEST) -s -p no:cacheprovider
SANITIZED_TESTS := $(addprefix tests/,backends/test_bits.py backends/test_adafactor_bits.py storage/test_formats.py \
	storage/test_quantization.py engine/test_norm.py engine/test_tensors.py reports/test_threads.py \
	reports/test_state_moved_away.py reports/test_versions.py)

sanitize: $(SANITIZED)/.installed $(EMULATED)/.installed
	$(SANITIZED_PYTEST) -m "not slow and not thorough" $(SANITIZED_TESTS)

sanitize-all: $(SANITIZED)/.installed $(EMULATED_ALL)/.installed
	$(SANITIZED_PYTEST) -m "not slow" $(SANITIZED_TESTS)

ci: test lint sanitize docs

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
