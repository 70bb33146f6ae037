# make train, make test, make lint: each sets up $(VENV) on first use, and again when pyproject.toml changes.
#   PYTHON=python3.12                 chooses the interpreter
#   ACCEL=cuda12 | cuda13 | tpu       adds JAX's accelerator packages
#   ARGS="--hidden-size 256"          goes to the job

VENV ?= .venv
ACCEL ?=
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed$(addprefix -,$(ACCEL))
comma := ,

# Without PYTHON= an environment that is there keeps its interpreter.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(if $(wildcard $(VENV)/.installed*),$(BIN)/python,python3)
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
INSTALLED_VERSION := $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(VERSION),$(INSTALLED_VERSION))
.PHONY: $(STAMP)
endif

.PHONY: train test test-full lint check clean
.DEFAULT_GOAL := check

define GPU_HINT
@if command -v nvidia-smi >/dev/null 2>&1 && \
  ! $(BIN)/python -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then \
  echo "An NVIDIA GPU is visible and JAX is not using it: add ACCEL=cuda12 or ACCEL=cuda13 to use it."; fi
endef

check: $(STAMP)  ## ten seconds: is the gradient right on this machine?
	$(GPU_HINT)
	@$(BIN)/python -m jaxlstm

train: $(STAMP)  ## five minutes: a character language model on real text
	$(GPU_HINT)
	@$(BIN)/python -m experiments.char_lm $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-full: $(STAMP)
	@$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "jaxlstm needs Python 3.11 or newer, and $(PYTHON) is $(or $(VERSION),not there); name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) with Python $(VERSION): a minute or two ..."
	@if [ "$(PYTHON)" != "$(BIN)/python" ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $(VENV)/.installed*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev$(addprefix $(comma),$(ACCEL))]'
	@touch $@
