# make run    install, train LP, FT and LP-FT, build the book with that run in it
# make test   install, build the book from a clean cache, run all tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTED := _build/test
EXTRAS := offline,book,dev

# The embedded model and texts need no hub: do not wait for one. `make run HF_HUB_OFFLINE=0` allows it.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: run test book bench readme clean help

help:
	@sed -n '1,2s/^# //p' Makefile

$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@

run: $(STAMP)
	$(BIN)/lpft-nb run lp_ft -p task docstring-topic -p model minilm -p methods "LP,FT,LP-FT" -p seeds "0,1,2" -p max_train None -p epochs 5
	$(BIN)/python scripts/book.py
	$(BIN)/python scripts/summary.py

book: $(STAMP)
	$(BIN)/python scripts/book.py

# The book is built before the tests, so that its progress shows; what failed in it is reported by the tests.
test: $(STAMP)
	-$(BIN)/python scripts/book.py --output $(TESTED) --clean --no-run
	LPFT_BOOK=$(TESTED) $(BIN)/python -m pytest

bench: $(STAMP)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

readme: $(STAMP)
	$(BIN)/python scripts/readme.py --write

clean:
	rm -rf _build build dist nbs/_runs *.egg-info .pytest_cache .hypothesis .ruff_cache
