# Two commands do everything on a fresh machine: `make parity` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# The compiler for TPUs, apart from the rest: where it is installed JAX looks for a TPU.
TPU := TPU_LIBRARY_PATH=$(CURDIR)/$(VENV)/tpu/libtpu/libtpu.so

.PHONY: parity test test-slow lint format benchmark clean

parity: $(VENV)/.parity  ## JAX against PyTorch, bit for bit
	$(BIN)/seqpar parity

test: $(VENV)/.test $(VENV)/.tpu  ## every test
	$(TPU) $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.test  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(VENV)/.parity  ## seconds and memory by degree, as quoted in the README
	$(BIN)/python examples/benchmark_ulysses.py

$(VENV)/.parity: pyproject.toml $(CONSTRAINTS)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[parity]"
	touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]"
	touch $@ $(VENV)/.parity

$(VENV)/.tpu: $(VENV)/.test $(CONSTRAINTS)
	$(PIP) --no-deps --target $(VENV)/tpu libtpu || echo "No libtpu here: its tests are skipped."
	touch $@

clean:
	rm -rf $(VENV)
