# make, make train, make bench, make tour, make test, make lint: each one sets up $(VENV) on first use, and again when
# pyproject.toml changes.
#   PYTHON=python3.12                 chooses the interpreter
#   ACCEL=cuda12 | cuda13 | tpu       adds JAX's accelerator packages
#   ARGS="--hidden-size 256"          passes flags to the command

VENV ?= .venv
ACCEL ?=
ARGS ?=
BIN := $(VENV)/bin
comma := ,
NOTEBOOKS := tour check_gradients find_fixed_points

ifneq ($(filter-out cuda12 cuda13 tpu,$(ACCEL)),)
$(error ACCEL must be cuda12, cuda13 or tpu, got $(ACCEL))
endif

# An environment is kept, with its accelerator, until PYTHON= or ACCEL= asks for another one.
INSTALLED := $(firstword $(wildcard $(VENV)/.installed*))
ifeq ($(ACCEL),)
STAMP := $(or $(INSTALLED),$(VENV)/.installed)
else
STAMP := $(VENV)/.installed-$(ACCEL)
endif
EXTRA := $(patsubst $(VENV)/.installed-%,%,$(filter $(VENV)/.installed-%,$(STAMP)))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(or $(if $(INSTALLED),$(shell $(BIN)/python -c 'import sys; print(sys._base_executable)')),python3)
endif
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSION := $(call version_of,$(PYTHON))
ifneq ($(VERSION),$(call version_of,$(BIN)/python))
.PHONY: $(STAMP)
endif

.PHONY: check train bench tour docs docs-serve test test-lowest test-full lint clean
.DEFAULT_GOAL := check

define GPU_HINT
@if nvidia-smi -L 2>/dev/null | grep -q GPU && \
  ! $(BIN)/python -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then \
  echo "An NVIDIA GPU is visible but JAX does not use it; ACCEL=cuda12 or ACCEL=cuda13 installs what it needs."; fi
endef

check: $(STAMP)  ## ten seconds: check the gradient on this machine
	$(GPU_HINT)
	@$(BIN)/python -m jaxlstm

train: $(STAMP)  ## three to five minutes: train a character language model on real text
	$(GPU_HINT)
	@$(BIN)/python -m experiments.char_lm $(ARGS)

bench: $(STAMP)  ## a quarter of an hour: compare speed with other libraries
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	@$(BIN)/python -m benchmarks.benchmark $(ARGS)

tour: $(STAMP)  ## three minutes: run the three notebooks in docs/ and save them with their output
	@cd docs && ../$(BIN)/jupytext --quiet --to ipynb $(NOTEBOOKS:%=%.py) && \
	../$(BIN)/jupyter execute --inplace $(NOTEBOOKS:%=%.ipynb)

# The variable turns off an announcement of the theme's authors, which would hide a warning about a page.
docs: $(STAMP)  ## ten seconds: build the site in build/site; every warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(STAMP)  ## show the site on this machine, and build it again when a page changes
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

test: $(STAMP)  ## five minutes
	@$(BIN)/python -m pytest -n 2 -m "not slow and not ci" $(ARGS)

test-lowest:  ## the same with the lowest versions of the package's own dependencies
	@mkdir -p build && $(PYTHON) tools/lowest.py > build/lowest.txt
	@PIP_CONSTRAINT=$(CURDIR)/build/lowest.txt $(MAKE) --no-print-directory test VENV=.venv-lowest PYTHON=$(PYTHON)

# All tests with XLA's optimizations, as users compile. The check for leaked tracers turns JAX's caches off, so only the
# tests of `make test` run with it.
test-full: $(STAMP)  ## every seed of every sweep; writes tests/results/
	@XLA_FLAGS="" $(BIN)/python -m pytest -n 2 --results tests/results $(ARGS)
	@JAX_CHECK_TRACER_LEAKS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not ci"
	@$(BIN)/python tests/mutations.py --count 300 --results tests/results/mutations.json

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "jaxlstm needs Python 3.11 or newer, and $(PYTHON) is $(or $(VERSION),not installed); choose one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) with Python $(VERSION); this takes a minute or two ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev$(addprefix $(comma),$(EXTRA))]'
	@touch $@
