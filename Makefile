# `make demo` and `make test` need nothing but Python 3.11 or 3.12 with pip: the first run makes a
# virtual environment in .venv and installs the package into it.
#
#   make test PYTHON=python3.12          another interpreter (makes .venv again if versions differ)
#   make demo EXTRAS=test,cuda           JAX for NVIDIA GPUs; `test,tpu` for TPUs

PYTHON ?= python3
EXTRAS ?= test
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(notdir $(PYTHON))-$(EXTRAS)
LINTERS := $(VENV)/.installed-$(notdir $(PYTHON))-lint

.PHONY: demo demo-cifar test test-fast lint docs bench clean

demo: $(INSTALLED)
	$(BIN)/python experiments/mnist_hint.py --preset quick

demo-cifar: $(INSTALLED)
	$(BIN)/python experiments/cifar_hint.py --preset quick

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

# Before a commit: the doors, and of each method the test against another source.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m fast tests

lint: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Offline, and every warning is an error: links and anchors are checked, types and names as well.
.PHONY: docs
docs: $(INSTALLED)
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -b html -n -W --keep-going docs build/docs
	@echo "Open build/docs/index.html"

# The short set. benchmarks/README.md has the whole one, and how to measure PyTorch's libraries too.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/hvp.py --batches 128 --rounds 5
	$(BIN)/python benchmarks/ihvp.py --rounds 3
	$(BIN)/python benchmarks/influence.py --rounds 5
	$(BIN)/python benchmarks/scaling.py --rounds 3 --only examples --examples 1000 4000 16000
	$(BIN)/python benchmarks/hint_selection.py --networks mnist --examples 5000
	$(BIN)/python benchmarks/hint_overhead.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

# An environment of the same Python version is kept, of another one replaced.
# pip is silent but for errors: it takes a minute or two, hence the line before.
$(INSTALLED): pyproject.toml
	@[ "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" ] || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing jaxpoison and what it needs into $(VENV) ($$($(PYTHON) -V)); once, minutes on a slow network ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

$(LINTERS): $(INSTALLED)
	@echo "Installing ruff and pyright into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[lint]"
	@touch $@
