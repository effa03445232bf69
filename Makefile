# Two commands do everything on a fresh machine: `make parity` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# The compiler for TPUs, apart from the rest: where it is installed JAX looks for a TPU.
TPU := TPU_LIBRARY_PATH=$(CURDIR)/$(VENV)/tpu/libtpu/libtpu.so

.PHONY: parity test test-slow test-gpu lint format benchmark clean

parity: $(VENV)/.parity  ## JAX against PyTorch, bit for bit
	$(BIN)/seqpar parity

# File by file in their order: by the number of their tests the longest would come last, alone.
test: $(VENV)/.test $(VENV)/.tpu  ## every test
	$(TPU) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test $(VENV)/.tpu  ## the tests that take minutes
	$(TPU) $(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.gpu  ## on an NVIDIA GPU; one is enough
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false \
	    $(BIN)/python -m pytest -n 8 -m "gpu or gpu_aot" parity_tests/test_gpu*.py \
	    parity_tests/test_fused.py

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

$(VENV)/.gpu: $(VENV)/.test
	$(PIP) -e ".[test,cuda]"
	touch $@

$(VENV)/.tpu: $(VENV)/.test $(CONSTRAINTS)
	$(PIP) --no-deps --target $(VENV)/tpu libtpu || echo "No libtpu here: its tests are skipped."
	touch $@

clean:
	rm -rf $(VENV)
