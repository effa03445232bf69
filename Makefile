# Two commands do everything on a fresh machine: `make parity` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

# The compiler for TPUs, apart from the rest: where it is installed JAX looks for a TPU.
TPU := TPU_LIBRARY_PATH=$(CURDIR)/$(VENV)/tpu/libtpu/libtpu.so

# What a newer Python than 3.11 changes is JAX and Flax (.ci/constraints.txt): the tests that ask most
# of those two, in an environment beside the other.
NEWEST := .venv-newest
NEWEST_CORE := $(addprefix parity_tests/test_, $(addsuffix .py, project_imports \
    flax_attention flax_attention_fn examples_train strategies_heads attention_communication \
    attention_bits exact_flags attention_peer_cases))

# At least one test of every folder, and a planted bug that has to be caught.
CHECK := $(addprefix parity_tests/test_, project_imports.py kernels_dense.py compare_bits.py \
    strategies_reshard.py bridge_convert.py training_batch.py torch_wrong_versions.py exact_arithmetic.py \
    kernels_blockwise.py::test_the_blocks_that_are_left_out \
    attention_values.py::test_lengths_are_padding flax_attention.py::test_output \
    parity_command.py::test_plain_kernels_differ \
    attention_mutations.py::test_a_causal_mask_that_is_dropped_is_caught)

.PHONY: check parity test test-slow test-newest test-gpu lint format reference benchmark clean

parity: $(VENV)/.parity  ## JAX against PyTorch, bit for bit
	$(BIN)/seqpar parity

check: $(VENV)/.test  ## a part of the tests, one of every folder at least
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(CHECK)

# File by file in their order: by the number of their tests the longest would come last, alone.
test: $(VENV)/.test $(VENV)/.tpu  ## every test but the slow ones
	$(TPU) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test $(VENV)/.tpu  ## the tests that take minutes
	$(TPU) $(BIN)/python -m pytest -m slow

test-newest:  ## a core of the tests on the newest JAX and Flax: PYTHON=python3.13, say
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit("$(PYTHON) is Python " \
	    + sys.version.split()[0] + ", which the newest JAX does not support. Write: make " \
	    + "test-newest PYTHON=python3.12, or a later one.")'
	$(MAKE) VENV=$(NEWEST) $(NEWEST)/.test
	$(NEWEST)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(NEWEST_CORE)

test-gpu: $(VENV)/.gpu  ## on an NVIDIA GPU; one is enough
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false \
	    $(BIN)/python -m pytest -n 8 -m "gpu or gpu_aot" parity_tests/test_kernels_gpu.py \
	    parity_tests/test_plan_gpu.py parity_tests/test_kernels_fused.py parity_tests/test_torch_gpu.py

lint: $(VENV)/.test  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: $(VENV)/.test  ## every public name, from the docstrings: .reference/index.html
	$(BIN)/python .ci/reference.py .reference

benchmark: $(VENV)/.parity  ## seconds and memory by degree, in both frameworks
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
	rm -rf $(VENV) $(NEWEST)
