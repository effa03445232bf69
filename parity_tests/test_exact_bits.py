"""Exact attention: PyTorch and JAX, written apart, agree in every bit; and nothing moves a bit."""

import jax
import numpy as np
import pytest
from exact_cases import CASE, OPTIONS, SHAPES, jax_exact, torch_exact

from jax_seqpar.bridge import compare_bits


def check_equal(a, b):
    report = compare_bits(a, b)
    assert report.equal, str(report)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_frameworks_with_every_option(options):
    inputs = CASE.inputs()
    ours = jax_exact(inputs, **options)
    check_equal(ours, torch_exact(inputs, **options))
    assert all(np.isfinite(x).all() and len(np.unique(x)) > 50 for x in ours.values())


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_both_frameworks_with_every_shape(case):
    inputs = case.inputs()
    options = {"is_causal": case.is_causal}
    check_equal(jax_exact(inputs, **options), torch_exact(inputs, **options))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("name", ("causal", "all at once"))
def test_every_dtype(dtype, name):
    inputs = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in CASE.inputs().items()}
    check_equal(jax_exact(inputs, **OPTIONS[name]), torch_exact(inputs, **OPTIONS[name]))


@pytest.mark.parametrize("name", ("full", "causal window", "segments", "all at once"))
def test_no_bit_depends_on_the_blocks(name):
    inputs = CASE.inputs()
    whole = jax_exact(inputs, **OPTIONS[name])
    for query_chunk, key_chunk in ((1, 4), (5, 23), (8, 7)):
        options = OPTIONS[name] | {"query_chunk": query_chunk, "key_chunk": key_chunk}
        check_equal(jax_exact(inputs, **options), whole)
