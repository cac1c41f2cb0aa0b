# Everything a contributor types. A clean clone needs only Python 3.10 or newer and make; the rest goes into .venv/.
#
#   make PYTHON=python3.12 test        another Python for a new .venv/
#   make test ARGS="-k merge -x"       arguments for pytest
#   make test WORKERS=0                in one process, for a debugger (usual: one a core, at most 4)
#   make demo PIP_ARGS="..."           more arguments for pip, such as an index with CPU builds of torch
#
# Works with GNU make 3.81 (macOS) and later.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3 python; do \
    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo "$$python" && break; done)
ARGS ?=
PIP_ARGS ?=
WORKERS ?= auto

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Stamps: what is installed is as new as the two files that say what to install.
INSTALLED := .venv/.installed-test
LINTERS := .venv/.installed-lint
SITE := .venv/.installed-docs
ORACLES := .venv/.installed-oracles
RESULTS := benchmarks/data/results

.PHONY: help demo test lint types docs oracles bench clean distclean

help:
	@echo "make demo       see the mission work, on small real models"
	@echo "make test       the tests that take seconds (ARGS=... goes to pytest)"
	@echo "make lint       ruff check and mypy --strict (make types: mypy alone)"
	@echo "make docs       the site, docs/_build/html; a warning is an error"
	@echo "make oracles    install the other tools that tests and benchmarks compare with"
	@echo "make bench      the benchmarks, side by side with those tools; slow, wants a quiet machine and 25 GB of disk"
	@echo "make clean      remove caches and outputs (make distclean: .venv and the benchmarks' data too)"

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(ARGS)

# One thread for each worker: more would only wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 $(ARGS)

lint: $(LINTERS)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy --strict

types: $(LINTERS)
	$(BIN)/python -m mypy --strict

docs: $(SITE)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

oracles: $(ORACLES)

bench: $(ORACLES)
	$(BIN)/python benchmarks/inspect_adapter.py --out $(RESULTS)/inspect.json
	$(BIN)/python benchmarks/combine.py --out $(RESULTS)/combine.json
	$(BIN)/python benchmarks/extract.py --full --out $(RESULTS)/extract.json
	$(BIN)/python benchmarks/extract_conv.py --out $(RESULTS)/extract_conv.json
	$(BIN)/python benchmarks/merge.py --accuracy --out $(RESULTS)/merge.json

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo-output docs/_build
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv benchmarks/data

.venv/.created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer found"; echo "hint: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv .venv
	@touch $@

# torch alone and first: where a CPU build is on offer, nothing after it may replace it by a larger one.
$(INSTALLED): .venv/.created pyproject.toml constraints.txt
	$(PIP) install $(PIP_ARGS) -c constraints.txt torch
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[test]'
	@touch $@

$(LINTERS): $(INSTALLED)
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[lint]'
	@touch $@

$(SITE): $(INSTALLED)
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

# Never fails because of an oracle: one that cannot be had here is named, loudly, and its tests are skipped.
$(ORACLES): $(INSTALLED) .ci/install_oracles.py
	$(BIN)/python .ci/install_oracles.py $(PIP_ARGS)
	@touch $@
