# Needs Python 3.11 or later and make; everything else goes into .venv.
#   make sample      set up, then generate images from an image prompt with the bundled model: out/sample.png
#   make test        set up with PyTorch and diffusers, then run lint, types and the default tests: unit, parity,
#                    integration
#   make test-light  the same without PyTorch          make test-full   also slow tests, experiments,
#                    benchmarks and fault injection
#   make lint, make format, make clean
# Variables: PYTHON, PIP_FLAGS (extra flags for pip), ARGS (for the command that is run: make test ARGS="-k unet -x",
# make sample ARGS="--image mine.jpg"), JOBS (number of test processes; each takes up to 6 GB).

# The first of these that starts: a shim on the PATH may name a Python that is not installed.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
PIP_FLAGS ?=
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PACKAGE := ipadapter_jax
PYRIGHT = $(BIN)/pyright --pythonpath $(BIN)/python
# tests/conftest.py sorts the longest files first; xdist's own order, by the number of tests, would run them last.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Python compiles a module when it is first imported; most are never imported.
INSTALL = $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e

.PHONY: help sample test test-light test-full lint lint-light style format clean
.NOTPARALLEL:  # only one target at a time may install into the environment
help:
	@sed -n 's/^# \{0,3\}//p;/^$$/q' Makefile

# One environment, one stamp file per step: a second call installs nothing, a changed version installs again.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or give make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is not Python 3.11 or later: give make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "the venv module is missing: on Debian, apt install python3-venv" >&2; exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the package into $(VENV) (about a minute)"
	$(INSTALL) '.[scripts]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $(VENV)/installed $@

$(VENV)/installed-torch: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the package with PyTorch and diffusers, which the tests compare with, into $(VENV) (two minutes)"
	$(INSTALL) '.[torch,dev]'
	@touch $(VENV)/installed $(VENV)/installed-dev $@

sample: $(VENV)/installed
	$(BIN)/python -m examples.sample_sheet $(ARGS)

test: $(VENV)/installed-torch lint
	$(PYTEST) $(ARGS)

test-light: $(VENV)/installed-dev lint-light
	$(PYTEST) -m "not slow and not gpu and not torch" $(ARGS)

test-full: $(VENV)/installed-torch lint
	$(BIN)/python -m pytest -m "not gpu" tests $(ARGS)

lint: $(VENV)/installed-torch style
	$(PYRIGHT)

# Without PyTorch the types of the scripts that import it are unknown, so only the package is checked.
lint-light: $(VENV)/installed-dev style
	$(PYRIGHT) $(PACKAGE)

style: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out build/lib build/bdist.* dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
