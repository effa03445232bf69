"""No flag, instruction set or number of threads changes a bit: one hash, and it is PyTorch's."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import exact_hash
import pytest
import torch
from exact_cases import NAMES, jax_exact, torch_exact

SCRIPT = Path(__file__).parent / "exact_hash.py"

SETTINGS = {
    "AVX2, configuration": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    },
    "SSE4.2, one thread": {
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false"
    },
    # Lets the compiler reorder sums and products, and suppose that no number is NaN.
    "fast math": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
    "not optimised": {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
}


@cache
def inputs():
    query, key, value, grad = exact_hash.inputs()
    return {"query": query, "key": key, "value": value, "grad": grad}


@cache
def expected():
    results = torch_exact(inputs(), **exact_hash.OPTIONS)
    return exact_hash.sha256([results[name] for name in NAMES])


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_flags(setting):
    found = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | setting,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [expected()] * 2, "on one device, and on four"


def test_not_compiled_as_a_whole():
    """Each of the operations around the loops by itself."""
    results = jax_exact(inputs(), False, **exact_hash.OPTIONS)
    assert exact_hash.sha256([results[name] for name in NAMES]) == expected()


@pytest.mark.parametrize("threads", (1, 2))
def test_threads_of_pytorch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = torch_exact(inputs(), **exact_hash.OPTIONS)
    finally:
        torch.set_num_threads(before)
    assert exact_hash.sha256([results[name] for name in NAMES]) == expected()


def test_the_hash_sees_one_bit():
    results = torch_exact(inputs(), **exact_hash.OPTIONS)
    arrays = [results[name].copy() for name in NAMES]
    arrays[2].ravel().view("u4")[7] ^= 1
    assert exact_hash.sha256(arrays) != expected()
