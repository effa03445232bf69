# Two commands do everything on a fresh machine: `make parity` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: parity test test-slow lint format benchmark clean

parity: $(VENV)/.parity  ## JAX against PyTorch, bit for bit
	$(BIN)/seqpar parity

test: $(VENV)/.test  ## every test
	$(BIN)/python -m pytest -n auto --dist loadfile

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

clean:
	rm -rf $(VENV)
